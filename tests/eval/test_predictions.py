import json

import pytest

from moellava.eval.predictions import Prediction, read_answers, read_predictions


def write_lines(path, records):
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    return path


def test_our_own_lines_survive_the_file(tmp_path):
    prediction = Prediction(
        id="7",
        images=("a.png",),
        question="Ist das ein Röntgenbild?",
        prompt="short",
        answer="A\nB",
        truth="left lung",
        answer_type="choice",
        answer_type_from="options",
        options=("left lung", "right lung"),
        groups={"modality": "X-ray", "question": "size"},
        num_tokens=3,
        seconds=0.25,
        is_cut=False,
        num_images_seen=1,
        probabilities={"left lung": 0.75, "right lung": 0.25},
    )
    path = tmp_path / "predictions.jsonl"
    path.write_text(prediction.as_line() + "\n", encoding="utf-8")
    assert list(read_predictions(path)) == [prediction]


def test_a_line_has_the_keys_of_the_contract():
    line = Prediction(
        id="1", answer="yes", truth="yes", answer_type="closed", answer_type_from="data"
    )
    contract = {
        "id", "images", "question", "prompt", "answer", "truth", "answer_type",
        "answer_type_from", "options", "groups", "num_tokens", "seconds",
    }  # fmt: skip
    assert contract <= json.loads(line.as_line()).keys()


def test_llava_answers_take_their_truth_from_the_data(tmp_path):
    record = {"question_id": 12, "prompt": "Q?", "text": "Yes", "answer_id": "x", "model_id": "m"}
    [answer] = read_answers(write_lines(tmp_path / "answers.jsonl", [record]))
    assert (answer.id, answer.answer) == ("12", "Yes")
    with pytest.raises(ValueError, match=r"'12' has no truth.*--data"):
        answer.joined({})
    joined = answer.joined({"truth": "yes", "answer_type": "CLOSED", "images": ("a.png",)})
    assert (joined.truth, joined.answer_type, joined.images) == ("yes", "closed", ("a.png",))
    assert joined.question == "Q?"


def test_samples_of_lmms_eval(tmp_path):
    record = {
        "doc_id": 3,
        "doc": {
            "question": "Which organ?", "answer_type": "OPEN", "img_name": "x/source.jpg",
            "modality": "CT", "content_type": "Organ", "triple": ["a", "b"], "qid": 5,
        },
        "target": "Liver",
        "resps": [["liver"]],
        "filtered_resps": ["liver"],
    }  # fmt: skip
    [found] = read_predictions(write_lines(tmp_path / "samples.jsonl", [record]))
    assert found == Prediction(
        id="3",
        images=("x/source.jpg",),
        question="Which organ?",
        answer="liver",
        truth="Liver",
        answer_type="open",
        answer_type_from="data",
        groups={"modality": "CT", "content_type": "Organ"},
    )


def test_the_file_that_lmms_eval_writes(tmp_path):
    """As 0.7.3 wrote it (shortened): the answer alone, the prompt, and nothing of the record."""
    record = {
        "doc_id": 1, "target": "yes", "filtered_resps": "Yes.", "doc_hash": "74234e98",
        "token_counts": [{"output_tokens": 2}], "strict_accuracy": 1.0, "input": "Is it CT?",
    }  # fmt: skip
    [found] = read_predictions(write_lines(tmp_path / "samples.jsonl", [record]))
    assert (found.id, found.answer, found.truth, found.question) == (
        "1",
        "Yes.",
        "yes",
        "Is it CT?",
    )
    assert (found.answer_type, found.answer_type_from) == ("closed", "truth is yes or no")


def test_other_layouts_by_keys(tmp_path):
    records = [{"n": 1, "out": {"text": ["B"]}, "gold": "lung", "choices": ["heart", "lung"]}]
    keys = {"id": "n", "answer": "out.text.0", "truth": "gold", "options": "choices"}
    path = tmp_path / "list.json"
    path.write_text(json.dumps(records))
    [found] = read_predictions(path, keys)
    assert (found.answer, found.truth, found.options) == ("B", "lung", ("heart", "lung"))
    assert (found.answer_type, found.answer_type_from) == ("choice", "options")


def test_an_unknown_field_is_named(tmp_path):
    with pytest.raises(ValueError, match=r"Unknown field of a prediction 'anwser'.*'answer'"):
        list(read_answers(tmp_path / "none.jsonl", {"anwser": "text"}))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"id": 1, "answer": "a", "truth": "b"}\n{"id": 2,', "line 2 is not JSON"),
        ("[1]", "line 1 is a int; expected an object"),
        ('{"id": 1, "prediction": "a"}', r"line 1 has no 'answer'.*--keys answer=KEY"),
        ('{"answer": "a"}', r"line 1 has no 'id'.*--keys id=KEY"),
    ],
)
def test_a_broken_line_is_named(tmp_path, text, message):
    path = tmp_path / "broken.jsonl"
    path.write_text(text)
    with pytest.raises(ValueError, match=message):
        list(read_predictions(path))
