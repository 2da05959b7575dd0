"""One record of each layout → a row, with every field in its place."""

import json

import numpy as np
import pytest

from moellava.data import Row, RowError, Turn, read_rows
from moellava.images import load_image
from moellava.testing import write_medmnist

from .conftest import BROKEN


def write(path, rows) -> str:
    path.write_text(json.dumps(rows, ensure_ascii=False), encoding="utf-8")
    return str(path)


def llava_row(**changes):
    turns = [{"from": "human", "value": "<image>\nWhy?"}, {"from": "gpt", "value": "No."}]
    return {"id": "a-1", "image": "a.jpg", "conversations": turns} | changes


class TestLlava:
    def test_a_row_as_llava_has_it(self, tmp_path):
        (row,) = read_rows(
            write(tmp_path / "train.json", [llava_row(domain="ct")]), images=tmp_path
        )
        assert row == Row(
            id="a-1",
            images=(str(tmp_path / "a.jpg"),),
            turns=(Turn("user", "<image>\nWhy?"), Turn("assistant", "No.")),
            source="llava",
            extra={"domain": "ct"},
        )

    def test_the_misspelt_key_is_read(self, tmp_path):
        row = llava_row()
        row["conversatons"] = row.pop("conversations")
        assert read_rows(write(tmp_path / "t.json", [row]))[0].answer == "No."

    def test_lists_of_images_text_only_rows_and_marks_anywhere(self, tmp_path):
        two = [
            {"from": "human", "value": "Is <image> older than <image>?"},
            {"from": "gpt", "value": "Yes."},
        ]
        none = [{"from": "human", "value": "What is CT?"}, {"from": "gpt", "value": "Tomography."}]
        last = [{"from": "human", "value": "Why?\n<image>"}, {"from": "gpt", "value": "No."}]
        rows = [
            llava_row(image=["a.jpg", "b.jpg"], conversations=two),
            {"id": 7, "conversations": none},
        ]
        rows += [llava_row(conversations=last), llava_row(image=["a.jpg"])]
        read = read_rows(write(tmp_path / "t.json", rows))
        assert [len(row.images) for row in read] == [2, 0, 1, 1]
        assert read[1].id == "7"
        assert read[2].turns[0].text == "Why?\n<image>"

    @pytest.mark.parametrize(
        ("written", "read"), [("OPEN", "OPEN"), ("close", "CLOSED"), ("yes/no", "yes/no")]
    )
    def test_answer_types_in_every_spelling(self, tmp_path, written, read):
        path = write(tmp_path / "t.json", [llava_row(answer_type=written)])
        assert read_rows(path)[0].answer_type == read

    def test_json_lines_are_the_same(self, tmp_path):
        rows = [llava_row(id=str(number)) for number in range(5)]
        (tmp_path / "t.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
        assert list(read_rows(tmp_path / "t.jsonl")) == list(
            read_rows(write(tmp_path / "t.json", rows))
        )

    def test_questions_without_answers(self, tmp_path):
        (tmp_path / "q.jsonl").write_text(
            json.dumps({"question_id": 3, "image": "a.jpg", "text": "Why?"})
        )
        (row,) = read_rows(tmp_path / "q.jsonl")
        assert (row.id, row.answer, row.turns) == ("3", None, (Turn("user", "<image>\nWhy?"),))

    def test_messages_of_chat_templates(self, tmp_path):
        turns = [
            {"role": "user", "content": "<image>Why?"},
            {"role": "assistant", "content": "No."},
        ]
        (row,) = read_rows(write(tmp_path / "t.json", [{"messages": turns, "images": ["a.jpg"]}]))
        assert (row.source, row.question, row.answer, len(row.images)) == (
            "messages",
            "Why?",
            "No.",
            1,
        )


class TestClassification:
    def test_medmnist_labels_become_answers(self, tmp_path):
        path = write_medmnist(tmp_path / "pathmnist.npz")
        rows = read_rows(path, split="test", class_names=["adipose", "debris", "mucus"])
        arrays = np.load(path)
        assert [row.answer for row in rows] == ["adipose", "debris", "mucus"]
        assert rows[1].question == "Which of these does the image show: adipose, debris, mucus?"
        for row, image in zip(rows, arrays["test_images"], strict=True):
            assert np.array_equal(np.asarray(load_image(row.images[0])), image)

    def test_several_labels_at_once(self, tmp_path):
        path = write_medmnist(tmp_path / "chestmnist.npz", multi_label=True)
        names = [f"finding {number}" for number in range(14)]
        rows = read_rows(path, split="train", class_names=names, question="Which findings?")
        labels = np.load(path)["train_labels"]
        for row, label in zip(rows, labels, strict=True):
            expected = ", ".join(name for name, is_on in zip(names, label, strict=True) if is_on)
            assert (row.question, row.answer) == ("Which findings?", expected or "none of these")

    def test_an_image_set_of_the_hub_brings_its_names(self, tmp_path):
        from datasets import ClassLabel, Dataset, Features, Image

        from moellava.testing.datasets import picture

        features = Features({"image": Image(), "label": ClassLabel(names=["benign", "malignant"])})
        table = {"image": [picture(0), picture(1)], "label": [1, 0]}
        Dataset.from_dict(table, features=features).to_parquet(tmp_path / "train.parquet")
        assert [row.answer for row in read_rows(tmp_path / "train.parquet")] == [
            "malignant",
            "benign",
        ]

    def test_errors(self, tmp_path):
        path = write_medmnist(tmp_path / "my.npz")
        with pytest.raises(ValueError, match=r"which split.*train, val, test"):
            read_rows(path)
        with pytest.raises(ValueError, match="what are the classes called"):
            read_rows(path, split="train")
        with pytest.raises(RowError, match=r"my\.npz, row 1: the label is 1; expected 0 to 0"):
            read_rows(path, split="train", class_names=["only"])


@pytest.mark.parametrize(("change", "message"), BROKEN)
def test_a_malformed_row_names_file_number_and_id(tmp_path, change, message):
    path = write(tmp_path / "train.json", [llava_row(), llava_row(id="bad-7", **change)])
    with pytest.raises(RowError, match=rf"train\.json, row 1 \(id 'bad-7'\): .*{message}"):
        read_rows(path)


def test_content_lists_of_chat_templates_are_read(tmp_path):
    content = [
        {"type": "text", "text": "Look: "},
        {"type": "image"},
        {"type": "text", "text": "Why?"},
    ]
    turns = [
        {"role": "user", "content": content},
        {"role": "assistant", "content": [{"type": "text", "text": "No."}]},
    ]
    (row,) = read_rows(write(tmp_path / "t.json", [{"messages": turns, "images": ["a.jpg"]}]))
    assert (row.turns[0].text, row.answer) == ("Look: <image>\nWhy?", "No.")
    content[1]["image"] = "b.jpg"
    (row,) = read_rows(write(tmp_path / "u.json", [{"messages": turns}]))
    assert row.images == (str(tmp_path / "b.jpg"),)
    content[1]["type"] = "audio"
    with pytest.raises(RowError, match="not of the type text or image"):
        read_rows(write(tmp_path / "v.json", [{"messages": turns}]))
