"""Rows that cannot be trained on are found before the first step, or left out by name."""

import json
import logging

import pytest
from PIL import Image

from moellava.data import Row, Turn
from moellava.storage.errors import LFS_FIRST_LINE
from moellava.train import train
from moellava.train.batches import read_data
from moellava.train.usable_rows import usable_rows
from tests.train.tiny import losses, tiny_recipe

pytestmark = pytest.mark.usefixtures("quick_runs")


@pytest.fixture
def folder(tiny, tmp_path):
    """The tiny rows, of which three cannot be used."""
    rows = json.loads((tiny / "rows.json").read_text())
    (tmp_path / "text.png").write_text("this is not a picture")
    rows[1]["image"], rows[2]["image"] = "missing.png", str(tmp_path / "text.png")
    del rows[4]["conversations"][1]
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    return tmp_path


def test_missing_and_unreadable_images_and_rows_without_answer_stop_before_a_step(tiny, folder):
    recipe = tiny_recipe(tiny, "tune", folder / "out", f"data.train={folder / 'rows.json'}")
    with pytest.raises(
        ValueError,
        match=r"(?s)3 of 20 rows of data.train cannot be used: 'row1' \(.*missing.png.*does not "
        r"exist.*'row2' \(.*text.png.*'row4' \(it has no answer\). Mend them, or .*skip_bad=true",
    ):
        train(recipe, show_progress=False)
    assert not (folder / "out").exists()


def test_skip_bad_leaves_them_out_by_name(tiny, folder, caplog):
    settings = [f"data.train={folder / 'rows.json'}", "data.skip_bad=true", "optim.max_steps=1"]
    recipe = tiny_recipe(tiny, "tune", folder / "out", *settings)
    with caplog.at_level(logging.WARNING):
        result = train(recipe, show_progress=False)
    assert "'row1'" in caplog.text
    assert "'row4'" in caplog.text
    assert len(losses(result)) == 1
    kept = read_data(recipe).train
    assert [row.id for row in kept[:4]] == ["row0", "row3", "row5", "row6"]
    assert len(kept) == 17


def test_held_out_rows_are_looked_at_too(tiny, folder):
    settings = [f"data.evaluation={folder / 'rows.json'}"]
    with pytest.raises(ValueError, match=r"3 of 20 rows of data.evaluation cannot be used"):
        train(tiny_recipe(tiny, "tune", folder / "out", *settings), show_progress=False)


def test_no_usable_row_is_an_error_with_skip_bad_too():
    rows = [Row(id="a", images=(), turns=(Turn("user", "why?"),))]
    with pytest.raises(ValueError, match=r"1 of 1 rows of data.train cannot be used: 'a'"):
        usable_rows(rows, "data.train", skip_bad=True, show_progress=False)


def test_a_git_lfs_pointer_in_place_of_an_image_is_called_one(tmp_path):
    (tmp_path / "a.png").write_bytes(LFS_FIRST_LINE + b"\noid sha256:0\nsize 9\n")
    turns = (Turn("user", "<image> why?"), Turn("assistant", "so"))
    rows = [Row(id="a", images=(str(tmp_path / "a.png"),), turns=turns)]
    with pytest.raises(ValueError, match=r"'a' \(.*a\.png is a Git LFS pointer"):
        usable_rows(rows, "data.train", skip_bad=False, show_progress=False)


def test_images_in_memory_are_taken_as_they_are():
    turns = (Turn("user", "<image> why?"), Turn("assistant", "so"))
    rows = [Row(id="a", images=(Image.new("RGB", (4, 4)),), turns=turns)]
    assert usable_rows(rows, "data.train", skip_bad=False, show_progress=False) is rows
    with pytest.raises(ValueError, match=r"'b' \(.*cannot identify image"):
        usable_rows(
            [Row(id="b", images=(b"nothing",), turns=turns)],
            "data.train",
            skip_bad=False,
            show_progress=False,
        )
