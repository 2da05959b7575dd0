"""`moellava eval`: the commands on files, and on a saved tiny model."""

import json

import pytest
from typer.testing import CliRunner

from moellava.cli import app
from moellava.eval.predictions import Prediction

runner = CliRunner()


def write(path, answers):
    rows = [
        Prediction(
            id=str(number), images=(f"{number}.png",), answer=answer, truth="yes",
            answer_type="closed", answer_type_from="data", groups={"modality": "CT"}, is_cut=False,
        )
        for number, answer in enumerate(answers)
    ]  # fmt: skip
    path.parent.mkdir(exist_ok=True)
    path.write_text("".join(f"{row.as_line()}\n" for row in rows))
    return path


def test_score_prints_a_table_and_counts(tmp_path):
    path = write(tmp_path / "p.jsonl", ["yes", "no", "", "yes"])
    done = runner.invoke(app, ["eval", "score", str(path), "--scorer", "strict"])
    assert done.exit_code == 0, done.output
    assert "closed_accuracy   50.0" in done.output
    assert "1 answers are empty" in done.output


def test_score_writes_the_files(tmp_path):
    path = write(tmp_path / "p.jsonl", ["yes", "no"])
    done = runner.invoke(app, ["eval", "score", str(path), "--out", str(tmp_path / "out")])
    assert done.exit_code == 0, done.output
    scores = json.loads((tmp_path / "out" / "scores.json").read_text())
    assert scores["scorers"]["strict"]["metrics"]["accuracy"]["value"] == 0.5
    assert (tmp_path / "out" / "report.html").is_file()


def test_score_takes_keys_and_data(tmp_path):
    data = [{"id": 7, "conversations": [{"from": "human", "value": "CT?"},
                                        {"from": "gpt", "value": "yes"}]}]  # fmt: skip
    (tmp_path / "rows.json").write_text(json.dumps(data))
    (tmp_path / "p.jsonl").write_text(json.dumps({"n": 7, "out": {"text": "yes"}}) + "\n")
    done = runner.invoke(
        app,
        ["eval", "score", str(tmp_path / "p.jsonl"), "--data", str(tmp_path / "rows.json"),
         "--keys", "id=n,answer=out.text", "--scorer", "slake_exact"],
    )  # fmt: skip
    assert done.exit_code == 0, done.output
    assert "accuracy         100.0" in done.output


def test_compare_prints_differences_and_writes_them(tmp_path):
    write(tmp_path / "a" / "predictions.jsonl", ["yes", "yes", "no"])
    write(tmp_path / "b.jsonl", ["no", "yes", "no", "yes"])
    done = runner.invoke(
        app,
        ["eval", "compare", str(tmp_path / "a"), str(tmp_path / "b.jsonl"), "--scorer", "strict",
         "--out", str(tmp_path / "c.json"), "--group-by", "modality"],
    )  # fmt: skip
    assert done.exit_code == 0, done.output
    assert "only B answers 1 questions" in done.output
    assert done.output.count("closed_accuracy") == 2 == done.output.count("modality: CT") + 1
    found = json.loads((tmp_path / "c.json").read_text())
    assert found["scorers"]["strict"]["metrics"]["accuracy"]["only_first"] == 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--scorer", "strikt"], "Did you mean 'strict'"),
        (["--group-by", "modalty"], "Did you mean 'modality'"),
        (["--keys", "answer"], "expected FIELD=KEY"),
    ],
)
def test_mistakes_are_one_line(tmp_path, options, message):
    path = write(tmp_path / "p.jsonl", ["yes"])
    done = runner.invoke(app, ["eval", "score", str(path), *options])
    assert done.exit_code != 0
    assert message in done.output


def test_a_checkpoint_is_evaluated_without_the_word_run(eval_checkpoint, tmp_path):
    folder = eval_checkpoint
    arguments = [
        "eval", str(folder / "saved"), str(folder / "rows.json"),
        "--images", str(folder / "images"), "--out", str(tmp_path), "--limit", "3",
        "--max-new-tokens", "2", "--device", "cpu",
        "--baselines", "blank,most_frequent", "--scorer", "strict", "--resamples", "20",
    ]  # fmt: skip
    done = runner.invoke(app, arguments)
    assert done.exit_code == 0, done.output
    assert "most_frequent" in done.output
    assert "3 answers were cut at the most new tokens" in done.output
    assert "the model was given 2 images for 3 questions" in done.output
    scores = json.loads((tmp_path / "scores.json").read_text())
    assert scores["num_questions"] == 3
    assert scores["baselines"]["blank"]["num_images_seen"] == 2
    assert runner.invoke(app, arguments).exit_code == 0  # again: nothing is left to ask


@pytest.fixture
def eval_checkpoint(tmp_path_factory):
    from moellava import load_pretrained_model
    from tests.train.tiny import parts_of, write_tiny

    folder = write_tiny(tmp_path_factory.mktemp("checkpoint"), num_rows=4)
    loaded = load_pretrained_model(parts_of(folder), dtype="float32")
    loaded.model.save_pretrained(folder / "saved")
    loaded.processor.save_pretrained(folder / "saved")
    return folder
