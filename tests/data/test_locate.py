"""Where the files and images of a dataset are found."""

import pytest

from moellava.data import read_rows
from moellava.images import load_image
from moellava.testing import write_pmc_vqa, write_slake


def test_slake_and_pmc_vqa_with_their_images_unpacked(tmp_path):
    slake = write_slake(tmp_path / "slake", zipped=False)
    assert load_image(read_rows(slake / "test.json")[0].images[0]).size == (64, 48)
    pmc = write_pmc_vqa(tmp_path / "pmc", zipped=False)
    assert load_image(read_rows(pmc / "train_2.csv")[0].images[0]).size == (64, 48)
    assert read_rows(pmc / "test.csv", images=pmc / "images")[0].answer == "C"


def test_an_unknown_id_says_how_to_fetch_it(no_network):
    with pytest.raises(FileNotFoundError, match="hf download nobody/nothing --repo-type dataset"):
        read_rows("nobody/nothing")
