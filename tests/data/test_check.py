"""Each defect planted in a sound dataset is found, named, and nothing else is."""

import json
from collections import Counter

import pytest
from PIL import Image

from moellava.data import read_rows
from moellava.data.check import check_rows
from moellava.data.fingerprints import fingerprint
from moellava.testing.datasets import picture


def conversation(question, answer="No."):
    return [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]


def row(number: int, **changes):
    return {
        "id": f"r{number}",
        "image": f"{number}.png",
        "conversations": conversation(f"<image>\nQuestion {number}?"),
    } | changes


@pytest.fixture
def folder(tmp_path):
    """Six pictures, 0.png to 5.png, with their rows."""
    for number in range(6):
        picture(number, size=(200, 160)).save(tmp_path / f"{number}.png")
    return tmp_path


def report_of(folder, rows, against=None, **options):
    def read(rows, name):
        (folder / name).write_text(json.dumps(rows))
        return read_rows(folder / name, images=folder, skip_bad=True)

    test = None if against is None else read(against, "test.json")
    return check_rows(read(rows, "train.json"), against=test, **options)


def found(report) -> list[tuple[str, str]]:
    return [(problem.kind, problem.where) for problem in report.problems]


def test_a_sound_dataset_has_no_problems(folder):
    report = report_of(
        folder, [row(number) for number in range(4)], [row(number) for number in (4, 5)]
    )
    assert found(report) == []
    assert (report.num_rows, report.num_images, report.num_errors) == (4, 4, 0)


@pytest.mark.parametrize(
    ("changes", "kind", "detail"),
    [
        ({"image": "none.png"}, "missing image", "none.png does not exist"),
        ({"image": "broken.png"}, "unreadable image", "broken.png cannot be read as an image"),
        ({"image": "patient.dcm"}, "unreadable image", "patient.dcm"),
        (
            {"conversations": conversation("<image> Why?", " ")},
            "empty turn",
            "turn 1 (assistant) is empty",
        ),
        (
            {"conversations": conversation("Why?")},
            "placeholder mismatch",
            "0 <image> marks for 1 images",
        ),
        (
            {"conversations": conversation("<image> <image>")},
            "placeholder mismatch",
            "2 <image> marks for 1 images",
        ),
        ({"conversations": "Why?"}, "malformed", "expected a list"),
        (
            {"conversations": conversation("<image>\nQuestion 1?")} | {"image": "1.png"},
            "duplicate row",
            "row 1",
        ),
    ],
)
def test_a_planted_defect_is_the_one_problem(folder, changes, kind, detail):
    (folder / "broken.png").write_bytes((folder / "0.png").read_bytes()[:200])
    (folder / "patient.dcm").write_bytes(b"\0" * 128 + b"DICM" + b"\0" * 10)
    report = report_of(folder, [row(0), row(1), row(2), row(3, **changes)])
    assert found(report) == [(kind, "row 3 (id 'r3')")]
    assert detail in report.problems[0].detail
    assert report.num_errors == 1


def test_a_shared_id_is_a_warning(folder):
    report = report_of(folder, [row(0), row(1, id="r0")])
    assert found(report) == [("duplicate id", "row 1 (id 'r0')")]
    assert report.num_errors == 0


def test_a_copy_of_an_image_under_another_name_makes_a_duplicate_row(folder):
    (folder / "copy.png").write_bytes((folder / "0.png").read_bytes())
    rows = [row(0), row(1, image="copy.png", conversations=conversation("<image>\nQuestion 0?"))]
    assert found(report_of(folder, rows)) == [("duplicate row", "row 1 (id 'r1')")]


class TestLeaks:
    def test_a_shared_id(self, folder):
        report = report_of(folder, [row(0), row(1)], [row(2, id="r1")])
        assert found(report) == [("leak: same id", "row 1 (id 'r1')")]

    def test_an_image_of_the_same_bytes(self, folder):
        (folder / "copy.png").write_bytes((folder / "1.png").read_bytes())
        report = report_of(folder, [row(0), row(1)], [row(2), row(3, image="copy.png")])
        assert found(report) == [("leak: same image", "row 1 (id 'r1')")]
        assert "row 1 (id 'r3')" in report.problems[0].detail

    @pytest.mark.parametrize("change", ["smaller", "jpeg", "brighter"])
    def test_an_image_that_was_changed_a_little(self, folder, change):
        image = Image.open(folder / "1.png")
        if change == "smaller":
            image.resize((90, 72)).save(folder / "copy.png")
        elif change == "jpeg":
            image.save(folder / "copy.png", format="JPEG", quality=60)
        else:
            image.point(lambda value: min(255, value + 6)).save(folder / "copy.png")
        report = report_of(folder, [row(0), row(1)], [row(2), row(3, image="copy.png")])
        assert found(report) == [("leak: similar image", "row 1 (id 'r1')")]

    def test_other_pictures_and_blank_ones_are_no_leak(self, folder):
        Image.new("L", (50, 50), 0).save(folder / "black.png")
        Image.new("L", (50, 50), 9).save(folder / "grey.png")
        train = [row(0), row(1), row(2, image="black.png")]
        assert found(report_of(folder, train, [row(4), row(5), row(3, image="grey.png")])) == []

    def test_row_numbers_in_place_of_ids_are_no_leak(self, folder, dataset_cache):
        name = "flaviagiammarino/vqa-rad"
        train, test = (read_rows(name, split=split) for split in ("train", "test"))
        assert not [
            kind for kind, _ in found(check_rows(train, against=test)) if kind == "leak: same id"
        ]


def test_lengths_are_the_tokenizers_and_the_summary_counts(folder, hub_cache):
    from transformers import AutoTokenizer

    from moellava.testing import TINYLLAMA

    rows = [
        row(0, answer_type="OPEN"),
        row(1, answer_type="closed", split="x"),
        row(2, answer_type="close"),
    ]
    tokenizer = AutoTokenizer.from_pretrained(TINYLLAMA)
    report = report_of(folder, rows, tokenizer=tokenizer)
    text = "<|user|>\n\nQuestion 0?</s>\n<|assistant|>\nNo.</s>\n"
    assert report.lengths[0] == len(tokenizer(text).input_ids)
    assert report.unit == "tokens"
    assert report.by_answer_type == Counter(OPEN=1, CLOSED=2)
    assert report.by_split == Counter({"(none)": 2, "x": 1})
    assert report_of(folder, rows).lengths == [3, 3, 3]  # words


def test_each_image_is_read_once(folder, monkeypatch):
    from moellava.data import check

    reads = []
    monkeypatch.setattr(
        check, "fingerprint", lambda image: reads.append(image) or fingerprint(image)
    )
    rows = [row(number, image="0.png") for number in range(5)]
    assert report_of(folder, rows).num_images == 1
    assert len(reads) == 1


def test_a_row_without_an_answer_is_an_error(folder):
    asked = [{"from": "human", "value": "<image>\nWhy?"}]
    report = report_of(folder, [row(0), row(1, conversations=asked)])
    assert found(report) == [("no answer", "row 1 (id 'r1')")]
    assert report.num_errors == 1
