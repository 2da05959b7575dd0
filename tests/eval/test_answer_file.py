import json

import pytest

from moellava.eval.answer_file import AnswerFile
from moellava.eval.predictions import Prediction, read_predictions


def prediction(row_id, answer="yes"):
    return Prediction(
        id=row_id, answer=answer, truth="yes", answer_type="closed", answer_type_from="data"
    )


def test_lines_are_found_again_and_sorted_at_the_end(tmp_path):
    path = tmp_path / "deep" / "predictions.jsonl"
    file = AnswerFile(path, {"prompt": "none"})
    file.append([prediction("b"), prediction("c")])
    again = AnswerFile(path, {"prompt": "none"})
    assert again.done == {"b", "c"}
    again.append([prediction("a", "line\nbreak\u2028")])
    again.finish(["a", "b", "c"])
    assert [one.id for one in read_predictions(path)] == ["a", "b", "c"]


@pytest.mark.parametrize("half", ['{"id": "c", "ans', '{"id": "ü'.encode()[:-1], b"\xff"])
def test_half_a_line_is_dropped(tmp_path, half):
    path = tmp_path / "predictions.jsonl"
    file = AnswerFile(path, {})
    file.append([prediction("a"), prediction("b")])
    with path.open("ab") as open_file:
        open_file.write(half if isinstance(half, bytes) else half.encode())
    again = AnswerFile(path, {})
    assert again.done == {"a", "b"}
    again.append([prediction("c")])
    assert [one.id for one in read_predictions(path)] == ["a", "b", "c"]


def test_settings_that_differ_are_named_with_both_values(tmp_path):
    path = tmp_path / "predictions.jsonl"
    AnswerFile(path, {"prompt": "none", "max_new_tokens": 4}).append([prediction("a")])
    with pytest.raises(
        ValueError, match=r"\(max_new_tokens\): max_new_tokens was 4 and is 8\. Choose"
    ):
        AnswerFile(path, {"prompt": "none", "max_new_tokens": 8})


def test_a_file_without_settings_is_not_trusted(tmp_path):
    path = tmp_path / "predictions.jsonl"
    path.write_text(json.dumps({"id": "a"}) + "\n")
    assert AnswerFile(path, {}).done == set()
    assert path.read_text() == ""
