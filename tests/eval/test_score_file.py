"""Scoring files: what is joined, what is left over, and without torch."""

import json
import subprocess
import sys

import pytest

from moellava.data import Row, Turn
from moellava.eval.questions import questions_of
from moellava.eval.score_file import score_file, write_scores
from tests.eval.contract import read_and_check


def rows(*truths):
    return [
        Row(
            id=str(number), images=(f"{number}.png",), answer_type="CLOSED",
            turns=(Turn("user", f"<image>\nQ{number}?"), Turn("assistant", truth)),
        )
        for number, truth in enumerate(truths)
    ]  # fmt: skip


def write_answers(path, answers):
    lines = [{"question_id": number, "text": text} for number, text in answers]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def test_llava_answers_are_joined_with_the_data(tmp_path):
    path = write_answers(tmp_path / "answers.jsonl", [(2, "no"), (0, "yes"), (1, "yes")])
    table, join = score_file(path, questions=questions_of(rows("yes", "no", "no")))
    assert table.ids == ["2", "0", "1"]
    assert table.column("strict", "closed_accuracy").tolist() == [1.0, 1.0, 0.0]
    assert table.num_images == 3
    assert (join.without_row, join.without_prediction) == ([], [])


def test_what_has_no_partner_is_listed(tmp_path):
    path = write_answers(tmp_path / "answers.jsonl", [(0, "yes"), (9, "no")])
    scores = write_scores(path, tmp_path / "out", questions=questions_of(rows("yes", "no")))
    assert scores["join"] == {"without_row": ["9"], "without_prediction": ["1"]}
    assert scores["num_questions"] == 1
    report = (tmp_path / "out" / "report.html").read_text()
    assert "1 predictions have no row in the data" in report
    assert "1 rows have no prediction" in report


def test_what_is_written_scores_the_same_again(tmp_path):
    path = write_answers(tmp_path / "answers.jsonl", [(0, "yes"), (1, "yes")])
    first = write_scores(path, tmp_path / "out", questions=questions_of(rows("yes", "no")))
    again = write_scores(tmp_path / "out" / "predictions.jsonl", tmp_path / "out")
    assert again["scorers"] == first["scorers"]


def test_two_predictions_for_one_row_are_refused(tmp_path):
    path = write_answers(tmp_path / "answers.jsonl", [(0, "yes"), (0, "no")])
    with pytest.raises(ValueError, match="1 predictions have the id of another: 0"):
        score_file(path, questions=questions_of(rows("yes")))


def test_a_file_without_a_prediction_is_refused(tmp_path):
    path = tmp_path / "empty.jsonl"
    path.write_text("")
    with pytest.raises(ValueError, match="no prediction to score"):
        score_file(path)


CLI = """
import sys
from moellava.cli import app
try:
    app(sys.argv[1:])
finally:
    loaded = sorted({"torch", "transformers", "open_clip"} & sys.modules.keys())
    print("loaded:", *loaded)
"""


def test_the_command_imports_no_torch_and_none_to_read_the_data(tmp_path):
    """LLaVA's answers have no truths, so that the data is read, its image names included."""
    turns = [{"from": "human", "value": "<image>\nCT?"}, {"from": "gpt", "value": "yes"}]
    row = {"id": 1, "image": "a.png", "conversations": turns, "answer_type": "CLOSED"}
    (tmp_path / "data.json").write_text(json.dumps([row]))
    path = write_answers(tmp_path / "answers.jsonl", [(1, "Yes.")])
    arguments = ["eval", "score", str(path), "--data", str(tmp_path / "data.json"),
                 "--out", str(tmp_path / "out"), "--resamples", "10"]  # fmt: skip
    done = subprocess.run(
        [sys.executable, "-c", CLI, *arguments], capture_output=True, text=True, check=True
    )
    assert done.stdout.splitlines()[-1] == "loaded:"
    _, scores = read_and_check(tmp_path / "out")
    assert scores["scorers"]["strict"]["metrics"]["closed_accuracy"]["value"] == 1.0
