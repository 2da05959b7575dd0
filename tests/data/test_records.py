"""Files as records: text stays text, and images that are missing are found without reading any."""

import pytest

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
