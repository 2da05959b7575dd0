"""Which frames a view shows, and how they are laid out."""

import numpy as np

from moellava.images import View
from moellava.images.view import montage


def test_a_grid_is_spread_from_the_first_to_the_last():
    assert View(frame="grid:4").frames(30, "x") == [0, 10, 19, 29]
    assert View(frame="grid").frames(3, "x") == [0, 1, 2]
    assert len(View(frame="grid").frames(100, "x")) == 16


def test_a_montage_is_filled_row_by_row_and_black_beyond():
    pictures = [np.full((2, 3), value, np.uint8) for value in (1, 2, 3, 4, 5)]
    grid = montage(pictures)
    assert grid[::2, ::3].tolist() == [[1, 2, 3], [4, 5, 0]]
