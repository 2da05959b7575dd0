"""Files that are whole or not there."""

import json
import os

import pytest

from moellava.storage.writing import replacing, write_json, write_text


def test_the_new_file_takes_the_place_of_the_old_one_at_once(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("old")
    with replacing(path) as part:
        part.write_text("new")
        assert path.read_text() == "old"
    assert path.read_text() == "new"
    assert os.listdir(tmp_path) == ["a.txt"]


def test_a_failure_leaves_the_old_file_and_nothing_else(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("old")

    def fail() -> None:
        with replacing(path) as part:
            part.write_text("half of the n")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fail()
    assert path.read_text() == "old"
    assert os.listdir(tmp_path) == ["a.txt"]


def test_text_and_json_are_utf8_and_end_in_a_newline(tmp_path):
    write_text(tmp_path / "a.txt", "Zürich")
    assert (tmp_path / "a.txt").read_bytes() == "Zürich".encode()
    write_json(tmp_path / "a.json", {"city": "Zürich"})
    text = (tmp_path / "a.json").read_bytes().decode("utf-8")
    assert json.loads(text) == {"city": "Zürich"}
    assert text.endswith("}\n")
    assert "Zürich" in text


def test_a_folder_that_is_not_there_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"a\.json cannot be written: .*none is not a fold"):
        write_json(tmp_path / "none" / "a.json", {})
