"""Files as records: text stays text, and images that are missing are found without reading any."""

import json
import os
import random

import numpy as np
import pytest
from datasets import Dataset

from moellava.data import RowError, read_rows


def test_a_pickle_is_refused(tmp_path):
    (tmp_path / "train_qa.pkl").write_bytes(b"x")
    with pytest.raises(ValueError, match="is a pickle, which can run code"):
        read_rows(tmp_path / "train_qa.pkl")


def test_an_image_that_a_table_lacks_is_found_without_reading_images(tmp_path):
    from datasets import Dataset, Features, Image, Value

    from moellava.testing.datasets import picture

    features = Features({"image": Image(), "question": Value("string"), "answer": Value("string")})
    table = {"image": [picture(0), None], "question": ["Why?"] * 2, "answer": ["No"] * 2}
    Dataset.from_dict(table, features=features).to_parquet(tmp_path / "train.parquet")
    with pytest.raises(RowError, match=r"row 1: it has no image"):
        read_rows(tmp_path / "train.parquet")


def test_text_that_looks_like_a_number_or_nothing_stays_text(tmp_path):
    (tmp_path / "t.csv").write_text('id,image,question,answer\n007,a.jpg,"How, many?",None\n')
    (row,) = read_rows(tmp_path / "t.csv")
    assert (row.id, row.question, row.answer) == ("007", "How, many?", "None")


def test_a_csv_of_semicolons_is_read(tmp_path):
    (tmp_path / "t.csv").write_text("image;question;answer\na.jpg;Why, then?;No\n")
    (row,) = read_rows(tmp_path / "t.csv")
    assert (row.question, row.answer) == ("Why, then?", "No")


def test_two_columns_of_one_name_are_refused(tmp_path):
    (tmp_path / "t.csv").write_text("image,question,answer,answer\na.jpg,Why?,No,Yes\n")
    with pytest.raises(ValueError, match=r"t\.csv has two columns 'answer'"):
        read_rows(tmp_path / "t.csv")


@pytest.mark.parametrize("suffix", ["csv", "json", "jsonl"])
@pytest.mark.parametrize(
    "data",
    ["image,question,answer\nä.jpg,Wärum?,Nö\n".encode("utf-16"), b"<html><body>404</body></html>"],
    ids=["utf-16", "web page"],
)
def test_text_of_another_encoding_or_kind_is_an_error_that_names_the_file(tmp_path, data, suffix):
    path = tmp_path / f"t.{suffix}"
    path.write_bytes(data)
    with pytest.raises(ValueError, match=rf"t\.{suffix}"):
        read_rows(path)


@pytest.mark.parametrize("suffix", ["csv", "json", "jsonl"])
@pytest.mark.parametrize("place", ["in the header", "in a row"])
def test_latin_1_is_told_to_be_saved_as_utf_8(tmp_path, suffix, place):
    rows = [{"image": "a.jpg", "question": "Warum?", "answer": "Nö"}] * 3
    if place == "in the header":
        rows = [row | {"größe": "1"} for row in rows]
    lines = [",".join(rows[0]), *(",".join(row.values()) for row in rows)]
    text = {
        "csv": "\n".join(lines),
        "json": json.dumps(rows, ensure_ascii=False),
        "jsonl": "\n".join(json.dumps(row, ensure_ascii=False) for row in rows),
    }
    path = tmp_path / f"t.{suffix}"
    path.write_bytes(text[suffix].encode("latin-1"))
    with pytest.raises(ValueError, match=rf"t\.{suffix}.*not UTF-8.*save it as UTF-8"):
        read_rows(path, cache_dir=tmp_path / "cache")


def test_a_table_with_other_columns_says_how_to_call_them(tmp_path):
    (tmp_path / "t.csv").write_text("img;q;a\na.jpg;Why?;No\n")
    message = r"t\.csv from its columns \['a', 'img', 'q'\].*rename the columns .* to image"
    with pytest.raises(ValueError, match=message):
        read_rows(tmp_path / "t.csv")


def test_arrays_that_unpack_a_thousandfold_are_refused(tmp_path):
    zeros = np.zeros((200, 200, 200), np.uint8)
    np.savez_compressed(tmp_path / "a.npz", train_images=zeros, train_labels=np.zeros((200, 1)))
    with pytest.raises(ValueError, match=r"a\.npz asks for .* \(expansion\)"):
        read_rows(tmp_path / "a.npz", split="train", class_names=["a", "b"])


def samples(folder):
    rows = [{"image": "a.jpg", "question": f"Why {n}?", "answer": "No"} for n in range(4)]
    table = {key: [row[key] for row in rows] for key in rows[0]}
    Dataset.from_dict(table).to_parquet(folder / "s.parquet")
    np.savez(folder / "s.npz", train_images=np.zeros((2, 3, 4), np.uint8), train_labels=[[0], [1]])
    return {
        "json": json.dumps(rows).encode(),
        "jsonl": "\n".join(map(json.dumps, rows)).encode(),
        "csv": b"image,question,answer\na.jpg,Why?,No\nb.jpg,How?,So\n",
        "parquet": (folder / "s.parquet").read_bytes(),
        "npz": (folder / "s.npz").read_bytes(),
    }


@pytest.mark.parametrize("suffix", ["json", "jsonl", "csv", "parquet", "npz"])
def test_mutated_files_are_read_or_refused_by_name(tmp_path, monkeypatch, suffix):
    """Tables go through `datasets`, which is slow; MOELLAVA_MUTATIONS asks for more."""
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    rng, data = random.Random(3), samples(tmp_path)[suffix]
    few = 10 if suffix in ("csv", "parquet") else 150
    for number in range(int(os.environ.get("MOELLAVA_MUTATIONS", few))):
        broken = bytearray(data)
        for _ in range(rng.randint(1, 6)):
            broken[rng.randrange(len(broken))] = rng.randrange(256)
        path = tmp_path / f"m{number}.{suffix}"
        path.write_bytes(broken[: rng.randrange(len(broken))] if rng.random() < 0.3 else broken)
        options = {"split": "train", "class_names": ["a", "b"]} if suffix == "npz" else {}
        try:
            read_rows(path, cache_dir=tmp_path / "cache", **options)
        except (ValueError, OSError) as error:
            assert path.name in str(error)  # noqa: PT017
