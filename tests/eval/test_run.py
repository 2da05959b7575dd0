"""`evaluate` end to end on a tiny model."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from moellava.eval.asking import Asker
from moellava.eval.baselines import ALL_BASELINES
from moellava.eval.predictions import read_predictions
from moellava.eval.run import evaluate
from tests.eval.contract import read_and_check
from tests.eval.samples import NEW, settings


@pytest.fixture(scope="module")
def results(tiny_loaded, eval_rows, eval_folder, tmp_path_factory):
    """One evaluation with everything, and where it lies."""
    out = tmp_path_factory.mktemp("results")
    scores = evaluate(
        tiny_loaded,
        eval_folder / "questions.json",
        out,
        settings(baselines=ALL_BASELINES),
        images=eval_folder / "images",
        leaks=eval_folder / "rows.json",
    )
    return scores, out


def test_files_and_their_contract(results):
    scores, out = results
    read_and_check(out)
    assert json.loads((out / "scores.json").read_text()) == json.loads(json.dumps(scores))
    assert (out / "report.html").read_text().startswith("<!doctype html>")
    predictions = list(read_predictions(out / "predictions.jsonl"))
    ids = [f"{image}-{number}" for number in range(4) for image in range(7)]
    assert [one.id for one in predictions] == [*ids, "text", "text#2"]
    assert predictions[0].images == ("scan0.png",)
    assert predictions[0].groups == {"modality": "CT"}
    assert predictions[0].probabilities.keys() == {"yes", "no"}
    assert predictions[15].probabilities is None  # an open question
    assert {one.num_images_seen for one in predictions[:28]} == {1}
    assert predictions[-1].num_images_seen == 0


def test_what_a_reader_of_the_numbers_has_to_know_is_there(results):
    scores, _ = results
    assert scores["num_questions"] == 30
    assert scores["num_images"] == 7
    assert scores["num_images_seen"] == 28
    assert scores["cut_answers"] == 30  # an untrained model does not stop
    assert scores["decoding"]["max_new_tokens"] == NEW
    assert scores["decoding"]["dtype"] == "torch.float32"
    assert len(scores["fingerprints"]["checkpoint"]) == len(scores["fingerprints"]["data"]) == 64
    assert {"moellava", "torch", "transformers"} <= scores["versions"].keys()
    assert scores["answer_types"]["closed"] == {"data": 14, "truth is yes or no": 1}
    assert scores["groups"]["modality"].keys() == {"CT", "MR"}
    assert scores["probabilities"]["all"]["n"] == 15


def test_baselines_are_other_answers_to_the_same_questions(results):
    scores, out = results
    assert scores["baselines"].keys() == scores["image_adds"].keys() == set(ALL_BASELINES)
    own = {one.id: one for one in read_predictions(out / "predictions.jsonl")}
    for name in ALL_BASELINES:
        other = {one.id: one for one in read_predictions(out / "baselines" / f"{name}.jsonl")}
        assert other.keys() == own.keys()
        assert {one.truth for one in other.values()} == {one.truth for one in own.values()}
    frequent = list(read_predictions(out / "baselines" / "most_frequent.jsonl"))
    assert {one.answer for one in frequent if one.answer_type == "closed"} <= {"yes", "no"}
    blind = list(read_predictions(out / "baselines" / "no_image.jsonl"))
    assert {one.num_images_seen for one in blind} == {0}
    seen = {name: entry["num_images_seen"] for name, entry in scores["baselines"].items()}
    assert seen == {"blank": 28, "other_image": 28, "no_image": 0, "most_frequent": None}


def test_what_the_image_adds_is_the_difference(results):
    scores, _ = results
    for name, adds in scores["image_adds"].items():
        found = adds["scorers"]["strict"]["metrics"]["accuracy"]
        own = scores["scorers"]["strict"]["metrics"]["accuracy"]["value"]
        other = scores["baselines"][name]["scorers"]["strict"]["metrics"]["accuracy"]["value"]
        assert found["value"] == pytest.approx(own - other)
        assert found["low"] <= found["value"] <= found["high"]


def test_limit_prompt_and_scorers(tiny_loaded, eval_rows, tmp_path):
    scores = evaluate(
        tiny_loaded,
        eval_rows,
        tmp_path,
        settings(limit=3, prompt="short", scorers=["mcq", "strict"]),
    )
    assert scores["num_questions"] == 3
    assert scores["prompts"] == {"short": 3}
    assert scores["scorers"].keys() == {"strict"}  # no question has options


def test_the_prompt_reaches_the_model(tiny_loaded, eval_rows, tmp_path, monkeypatch):
    read = []
    prompt_ids = Asker.prompt_ids

    def recorded(self, asked):
        ids = prompt_ids(self, asked)
        read.append(tiny_loaded.tokenizer.decode(ids))
        return ids

    monkeypatch.setattr(Asker, "prompt_ids", recorded)
    evaluate(tiny_loaded, eval_rows[:2], tmp_path, settings(prompt="Think first."))
    assert len(read) == 4  # two questions, once for their length and once for the answer
    assert all("Is this a CT image?\nThink first." in text for text in read)


def test_progress_is_shown_if_asked_for(tiny_loaded, eval_rows, tmp_path, capsys):
    evaluate(tiny_loaded, eval_rows[:2], tmp_path / "quiet", settings())
    assert "question" not in capsys.readouterr().err
    evaluate(tiny_loaded, eval_rows[:2], tmp_path / "shown", settings(progress=True))
    assert "predictions: 100%" in capsys.readouterr().err


def test_answers_of_other_settings_are_not_mixed(tiny_loaded, eval_rows, tmp_path):
    evaluate(tiny_loaded, eval_rows[:2], tmp_path, settings())
    with pytest.raises(
        ValueError, match=r"other settings \(prompt\): prompt was 'none' and is 'short'"
    ):
        evaluate(tiny_loaded, eval_rows[:2], tmp_path, settings(prompt="short"))
    with pytest.raises(ValueError, match=r"other settings \(fingerprints\)"):
        evaluate(tiny_loaded, eval_rows[:3], tmp_path, settings())


def test_a_checkpoint_that_cannot_see_images_is_refused(eval_folder, eval_rows, tmp_path):
    with pytest.raises(ValueError, match="mm_vision_tower"):
        evaluate(eval_folder / "tinyllama_tiny", eval_rows, tmp_path / "out", settings())


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_the_device_does_not_change_an_answer_in_float32(eval_checkpoint, eval_rows, tmp_path):
    for device in ("cpu", "cuda"):
        evaluate(
            eval_checkpoint, eval_rows, tmp_path / device, settings(device=device, dtype="float32")
        )
    answers = [
        [one.answer for one in read_predictions(tmp_path / device / "predictions.jsonl")]
        for device in ("cpu", "cuda")
    ]
    assert answers[0] == answers[1]


def test_one_image_cannot_be_another(tiny_loaded, eval_rows, tmp_path):
    with pytest.raises(ValueError, match="other_image needs two different images"):
        evaluate(tiny_loaded, eval_rows[:1], tmp_path, settings(baselines=["other_image"]))


WORKER = """
import sys, time
from pathlib import Path
import moellava.eval.run as run
from moellava import load_pretrained_model
from moellava.eval.answer_file import AnswerFile
from moellava.eval.settings import EvaluationSettings
from tests.train.tiny import parts_of

folder, out = Path(sys.argv[1]), sys.argv[2]
append = AnswerFile.append
def slow(self, predictions):
    append(self, predictions)
    print("batch", flush=True)
    time.sleep(0.1)
AnswerFile.append = slow
loaded = load_pretrained_model(parts_of(folder), dtype="float32")
settings = EvaluationSettings(
    max_new_tokens=4, num_resamples=50, batch_size=4, baselines=("blank", "most_frequent")
)
run.evaluate(loaded, folder / "questions.json", out, settings, images=folder / "images")
"""


def without_seconds(path):
    lines = []
    for line in path.read_text().splitlines():
        record = json.loads(line)
        record.pop("seconds")
        lines.append(record)
    return lines


@pytest.mark.slow
def test_a_killed_run_ends_with_the_same_files(eval_folder, tmp_path):
    """Killed after the first batch, then late, and with half a line written."""

    def start(out):
        return subprocess.Popen(
            [sys.executable, "-c", WORKER, str(eval_folder), str(out)],
            stdout=subprocess.PIPE, text=True, env={**os.environ, "PYTHONPATH": str(Path.cwd())},
        )  # fmt: skip

    whole, killed = tmp_path / "whole", tmp_path / "killed"
    assert start(whole).wait() == 0
    blank = killed / "baselines" / "blank.jsonl"
    for is_far_enough in (lambda: True, blank.exists):
        process = start(killed)
        assert process.stdout.readline() == "batch\n"
        while not is_far_enough():
            assert process.stdout.readline() == "batch\n"
        process.send_signal(signal.SIGKILL)
        process.wait()
    with blank.open("a") as file:
        file.write('{"id": "6-3", "ans')
    assert start(killed).wait() == 0
    for name in ("predictions.jsonl", "baselines/blank.jsonl", "baselines/most_frequent.jsonl"):
        assert without_seconds(killed / name) == without_seconds(whole / name)
    for name in ("scores.json", "report.html"):
        assert (killed / name).read_text() == (whole / name).read_text()


def test_no_leak_is_a_result_too(results):
    assert results[0]["leaks"]["num_leaked"] == 0
