"""Histograms of the lengths of rows."""

import re

import numpy as np
import pytest
from PIL import Image

from moellava.data.histogram import save_histogram, text_histogram

LENGTHS = [5, 5, 6, 17, 40, 40, 40, 1200]


def test_each_line_counts_the_rows_in_its_range():
    lines = text_histogram(LENGTHS, "tokens", bins=6).splitlines()
    assert lines[0] == "length of a row in tokens (without image placeholders)"
    found = [re.match(r" *([\d,]+) to +([\d,]+) +[#.]* +([\d,]+)$", line) for line in lines[1:]]
    for match in found:
        low, high, count = (int(text.replace(",", "")) for text in match.groups())
        assert count == sum(low <= length <= high for length in LENGTHS)
    assert sum(int(match[3]) for match in found) == len(LENGTHS)


def test_a_bin_with_one_of_many_rows_still_shows_a_mark():
    first, *_, last = text_histogram([1] * 10_000 + [100], "words", bins=4).splitlines()[1:]
    assert first.count("#") == 40
    assert "#" not in last
    assert "." in last


@pytest.mark.parametrize("length", [0, 7])
def test_rows_of_one_length_are_one_bin(length):
    assert len(text_histogram([length] * 3, "words").splitlines()) == 2


def test_the_picture_is_a_picture(tmp_path):
    save_histogram(LENGTHS, "tokens", "rows.json", tmp_path / "lengths.png")
    with Image.open(tmp_path / "lengths.png") as picture:
        assert picture.size == (1050, 525)
        assert np.asarray(picture.convert("L")).std() > 10
