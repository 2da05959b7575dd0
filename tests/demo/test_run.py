"""Image information reaches the language model, in a short setting, and the counter-proof."""

import json
import re
import shlex
from pathlib import Path

import pytest
from typer.testing import CliRunner

from moellava.cli import app
from moellava.data import Row, Turn
from moellava.demo.run import (
    DemoResult,
    HeldOutAnswer,
    exchange_images,
    majority_answers,
    run_demo,
    share_right,
)
from moellava.eval.baselines import ALL_BASELINES

NUM_STEPS = 160  # `moellava demo` trains for 400
MARGIN = 0.15  # over both baselines


def beats_both_baselines(result: DemoResult) -> bool:
    return result.accuracy > max(result.blank_accuracy, result.majority_accuracy) + MARGIN


def command_of_the_guide() -> list[str]:
    """The second of the two commands in docs/evaluation.md that give a stranger a report."""
    text = (Path(__file__).parents[2] / "docs" / "evaluation.md").read_text(encoding="utf-8")
    [command] = re.findall(
        r"^moellava (eval moellava-demo/.*?)\n```", text, re.DOTALL | re.MULTILINE
    )
    return shlex.split(command.replace("\\\n", " "))


@pytest.mark.slow(seconds=80)
def test_the_demo_beats_blank_images_and_evaluation_agrees(tmp_path, no_network, monkeypatch):
    """Against the majority answer, too; and the guide's command gives a report of all that."""
    out = tmp_path / "moellava-demo"
    result = run_demo(out, num_steps=NUM_STEPS, seed=0, show_progress=False)
    assert beats_both_baselines(result), result
    lines = [json.loads(line) for line in (out / "answers.jsonl").read_text().splitlines()]
    assert len(lines) == len(result.answers) == 6 * 12 * 3
    assert sum(line["is_right"] for line in lines) / len(lines) == result.accuracy
    assert {line["modality"] for line in lines} >= {"CT", "ultrasound"}

    monkeypatch.chdir(tmp_path)
    done = CliRunner().invoke(app, command_of_the_guide())
    assert done.exit_code == 0, done.output
    scores = json.loads((out / "evaluation" / "scores.json").read_text())
    accuracy = scores["scorers"]["strict"]["metrics"]["accuracy"]
    # Other words for a modality may count here and not there.
    assert accuracy["value"] == pytest.approx(result.accuracy, abs=0.02)
    assert accuracy["low"] < accuracy["value"] < accuracy["high"]
    assert set(scores["baselines"]) == set(ALL_BASELINES)
    for name in ("blank", "other_image"):
        adds = scores["image_adds"][name]["scorers"]["strict"]["metrics"]["accuracy"]
        assert adds["low"] > 0, name
    assert scores["most_frequent_from"] == "the training split"
    assert "<svg" in (out / "evaluation" / "report.html").read_text(encoding="utf-8")


@pytest.mark.slow
def test_a_model_trained_on_exchanged_images_does_not(tmp_path, no_network):
    result = run_demo(
        tmp_path, num_steps=NUM_STEPS, seed=0, show_progress=False, shuffle_images=True
    )
    assert not beats_both_baselines(result), result


@pytest.mark.slow
def test_a_seed_gives_the_same_answers_again_in_the_same_folder(tmp_path, no_network, monkeypatch):
    monkeypatch.setattr("moellava.demo.run.NUM_TRAIN_CROPS", 8)
    monkeypatch.setattr("moellava.demo.run.NUM_HELD_OUT_CROPS", 2)
    first, again = (run_demo(tmp_path, num_steps=3, seed=1, show_progress=False) for _ in range(2))
    assert [item.answer for item in first.answers] == [item.answer for item in again.answers]


def row(question: str, answer: str, image: str = "a.png") -> Row:
    turns = (Turn("user", f"<image>\n{question}"), Turn("assistant", answer))
    return Row(id="r", images=(image,), turns=turns)


def test_the_majority_answer_is_counted_per_question():
    train = [row("a", "yes"), row("a", "yes"), row("a", "no"), row("b", "no")]
    held_out = [row("a", "no"), row("b", "no"), row("c", "yes")]
    assert majority_answers(train, held_out) == ["yes", "no", "yes"]


def test_an_answer_must_be_the_whole_word():
    assert share_right([("normal", "no"), ("ct.", "CT"), ("MR image", "MR")]) == pytest.approx(
        1 / 3
    )
    assert HeldOutAnswer(row("a", "CT"), "ct.", "", "").is_right
    assert not HeldOutAnswer(row("a", "no"), "normal", "", "").is_right


def test_exchanging_moves_images_and_nothing_else():
    rows = [{"id": str(index), "image": f"{index}.png", "modality": "CT"} for index in range(20)]
    exchanged = exchange_images(rows, seed=0)
    assert [{**item, "image": ""} for item in exchanged] == [{**item, "image": ""} for item in rows]
    assert {item["image"] for item in exchanged} == {item["image"] for item in rows}
    assert sum(a["image"] != b["image"] for a, b in zip(rows, exchanged, strict=True)) > 15
