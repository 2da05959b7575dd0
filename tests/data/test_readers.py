"""Every layout as it is downloaded, against `datasets` and the standard library."""

import json

import numpy as np
import pytest

from moellava.data import RowError, read_rows
from moellava.images import load_image
from moellava.testing import write_vqa_rad_authors

from .conftest import BROKEN


def write(path, rows) -> str:
    path.write_text(json.dumps(rows, ensure_ascii=False), encoding="utf-8")
    return str(path)


def llava_row(**changes):
    turns = [{"from": "human", "value": "<image>\nWhy?"}, {"from": "gpt", "value": "No."}]
    return {"id": "a-1", "image": "a.jpg", "conversations": turns} | changes


class TestHub:
    """By the real ids, from a filled cache, sockets blocked; `datasets` is the oracle."""

    @pytest.mark.parametrize(
        ("name", "source", "splits"),
        [
            ("flaviagiammarino/vqa-rad", "vqa_rad", ("train", "test")),
            ("flaviagiammarino/path-vqa", "path_vqa", ("train", "validation", "test")),
        ],
    )
    def test_parquet_equals_what_datasets_reads(
        self, dataset_cache, no_network, name, source, splits
    ):
        from datasets import load_dataset

        for split in splits:
            rows = read_rows(name, split=split)
            theirs = load_dataset(
                "parquet",
                data_files=str(dataset_cache[name] / "data" / f"{split}-*.parquet"),
                split="train",
            )
            assert len(rows) == len(theirs)
            for row, record in zip(rows, theirs, strict=True):
                assert (row.question, row.answer) == (record["question"], record["answer"])
                assert (row.source, row.split, row.answer_type) == (source, split, None)
                assert np.array_equal(
                    np.asarray(load_image(row.images[0])),
                    np.asarray(record["image"].convert("RGB")),
                )

    def test_a_folder_of_parquet_is_the_same(self, dataset_cache):
        name = "flaviagiammarino/vqa-rad"
        assert list(read_rows(dataset_cache[name], split="test", format="vqa_rad")) == list(
            read_rows(name, split="test")
        )

    def test_slake_in_one_language_with_its_archive_of_images(self, dataset_cache, no_network):
        rows = read_rows("BoKelvin/SLAKE", split="train", language="en")
        records = json.loads((dataset_cache["BoKelvin/SLAKE"] / "train.json").read_text())
        records = [record for record in records if record["q_lang"] == "en"]
        assert rows.num_not_asked == 3
        for row, record in zip(rows, records, strict=True):
            assert (row.id, row.question, row.answer) == (
                str(record["qid"]),
                record["question"],
                record["answer"],
            )
            assert row.answer_type == record["answer_type"]
            assert row.extra["modality"] == record["modality"]
            assert load_image(row.images[0]).size == (64, 48)
        assert len(read_rows("BoKelvin/SLAKE", split="train")) == 6

    @pytest.mark.parametrize(("split", "letter"), [("train", "C"), ("test_2", "B")])
    def test_both_versions_of_pmc_vqa(self, dataset_cache, no_network, split, letter):
        (row, _) = read_rows("RadGenome/PMC-VQA", split=split)
        assert row.choices == ("CT", "MRI", "None", "X-ray")
        assert row.answer == letter
        assert row.turns[0].text.startswith(
            "<image>\nWhat modality is shown, in short?\nA: CT\nB: MRI\nC: None\n"
        )
        assert load_image(row.images[0]).size == (64, 48)
        assert row.images[0].endswith(
            "images/PMC1_0.jpg" if split == "train" else "figures/PMC2_0.jpg"
        )


class TestAuthorsFiles:
    def test_vqa_rad_splits_by_phrase_type(self, tmp_path):
        folder = write_vqa_rad_authors(tmp_path / "rad")
        test, train = (read_rows(folder, split=split) for split in ("test", "train"))
        assert ([row.id for row in test], [row.id for row in train]) == (
            ["2", "5"],
            ["0", "1", "3", "4"],
        )
        assert (train[0].answer_type, test[1].answer) == ("CLOSED", "3")
        assert len(read_rows(folder)) == 6
        assert load_image(test[0].images[0]).size == (64, 48)


class TestErrors:
    def test_skip_bad_counts_and_lists_them(self, tmp_path, caplog):
        rows = [
            llava_row(id="good"),
            *(llava_row(id=f"bad-{n}", **change) for n, (change, _) in enumerate(BROKEN)),
        ]
        read = read_rows(
            write(tmp_path / "t.json", [*rows, "no object", llava_row(id="also good")]),
            skip_bad=True,
        )
        assert [row.id for row in read] == ["good", "also good"]
        assert [bad.id for bad in read.bad] == [f"bad-{n}" for n in range(len(BROKEN))] + [None]
        assert [bad.index for bad in read.bad] == list(range(1, 14))
        assert "13 of 15 rows left out" in caplog.text
        assert [read.number(0), read.number(1)] == [0, 14]

    def test_a_row_of_a_table_is_named_too(self, tmp_path):
        (tmp_path / "train.csv").write_text("image,question,answer\na.jpg,Why?,No\nb.jpg,,No\n")
        with pytest.raises(RowError, match=r"train\.csv, row 1: the question is empty"):
            read_rows(tmp_path / "train.csv")

    def test_unknown_names_suggest_the_nearest(self, tmp_path, dataset_cache):
        path = write(tmp_path / "t.json", [llava_row()])
        with pytest.raises(ValueError, match=r"Unknown format 'lava'. Did you mean 'llava'"):
            read_rows(path, format="lava")
        with pytest.raises(ValueError, match=r"several splits.*test, train, validation"):
            read_rows("flaviagiammarino/path-vqa")
        with pytest.raises(ValueError, match="Did you mean 'validation'"):
            read_rows("flaviagiammarino/path-vqa", split="validatoin")
        with pytest.raises(
            ValueError, match=r"no usable row of split 'train' among 1\. Leave split out"
        ):
            read_rows(path, split="train")
        with pytest.raises(
            ValueError, match=r"Cannot tell the layout of .* from its columns \['x'\]"
        ):
            read_rows(write(tmp_path / "x.json", [{"x": 1}]))
        with pytest.raises(FileNotFoundError, match=r"no file or folder .*nowhere\.json"):
            read_rows(tmp_path / "nowhere.json")
        with pytest.raises(FileNotFoundError, match=r"image folder .* does not exist"):
            read_rows(path, images=tmp_path / "nowhere")
        (tmp_path / "t.xlsx").touch()
        with pytest.raises(ValueError, match=r"is a \.xlsx file; expected one of \.json"):
            read_rows(tmp_path / "t.xlsx")


def test_answer_types_are_derived_only_where_asked(dataset_cache):
    plain, derived = (
        read_rows("flaviagiammarino/vqa-rad", split="train", derive_answer_type=derive)
        for derive in (False, True)
    )
    assert {row.answer_type for row in plain} == {None}
    assert [row.answer_type for row in derived] == [
        "CLOSED" if row.answer in ("yes", "no") else "OPEN" for row in plain
    ]


def test_rows_work_in_the_workers_of_a_loader(dataset_cache, tmp_path):
    from torch.utils.data import DataLoader

    for rows in (
        read_rows(write(tmp_path / "t.json", [llava_row(id=str(n)) for n in range(8)])),
        read_rows("flaviagiammarino/vqa-rad", split="train"),
    ):
        loader = DataLoader(rows, batch_size=2, num_workers=2, collate_fn=list)
        assert [row for batch in loader for row in batch] == list(rows)
