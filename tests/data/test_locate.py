"""Where the files and images of a dataset are found."""

import json

import pytest

from moellava.data import RowError, read_rows
from moellava.images import load_image
from moellava.testing import write_pmc_vqa, write_slake
from moellava.testing.datasets import picture


def test_slake_and_pmc_vqa_with_their_images_unpacked(tmp_path):
    slake = write_slake(tmp_path / "slake", zipped=False)
    assert load_image(read_rows(slake / "test.json")[0].images[0]).size == (64, 48)
    pmc = write_pmc_vqa(tmp_path / "pmc", zipped=False)
    assert load_image(read_rows(pmc / "train_2.csv")[0].images[0]).size == (64, 48)
    assert read_rows(pmc / "test.csv", images=pmc / "images")[0].answer == "C"


def test_an_unknown_id_says_how_to_fetch_it(no_network):
    with pytest.raises(FileNotFoundError, match="hf download nobody/nothing --repo-type dataset"):
        read_rows("nobody/nothing")


@pytest.mark.parametrize(
    "first", [{}, {"image": "gone.png"}, {"image": ""}], ids=["no image", "missing", "empty"]
)
def test_the_first_row_does_not_decide_the_image_folder(tmp_path, first):
    (tmp_path / "images").mkdir()
    picture(0).save(tmp_path / "images" / "a.png")
    mark = "<image>\n" if first.get("image") else ""

    def row(mark, **fields):
        turns = [{"from": "human", "value": f"{mark}Why?"}, {"from": "gpt", "value": "No."}]
        return {"conversations": turns, **fields}

    rows = [row(mark, **first), *(row("<image>\n", image="a.png") for _ in range(3))]
    (tmp_path / "t.json").write_text(json.dumps(rows))
    assert load_image(read_rows(tmp_path / "t.json")[-1].images[0]).size == (64, 48)


def test_the_first_row_does_not_decide_the_layout(tmp_path):
    turns = [{"from": "human", "value": "Why?"}, {"from": "gpt", "value": "No."}]
    (tmp_path / "t.json").write_text(json.dumps([{"id": "x"}, {"conversations": turns}]))
    assert len(read_rows(tmp_path / "t.json", skip_bad=True)) == 1
    with pytest.raises(RowError, match=r"row 0 \(id 'x'\)"):
        read_rows(tmp_path / "t.json")
