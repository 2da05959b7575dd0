import numpy as np
import pytest

from moellava.images import View, parse_frame, parse_window
from moellava.images.view import montage


@pytest.mark.parametrize(
    ("text", "window"),
    [
        (None, None),
        ("lung", "lung"),
        ("full", "full"),
        ("40,400", (40, 400)),
        ("-600, 1500", (-600, 1500)),
        ("12.5,1e3", (12.5, 1000)),
        ("1", 1),
    ],
)
def test_windows_of_the_command_line(text, window):
    assert parse_window(text) == window
    View(window=window)


@pytest.mark.parametrize("text", ["40,", "1,2,3", "4.5", ","])
def test_windows_that_are_none_are_refused(text):
    with pytest.raises(ValueError, match="expected a preset, 'full', CENTER,WIDTH or a number"):
        parse_window(text)


def test_frames_of_the_command_line():
    assert [parse_frame(text) for text in (None, "3", "-1", "grid", "grid:9")] == [
        None,
        3,
        -1,
        "grid",
        "grid:9",
    ]


def test_a_grid_is_spread_from_the_first_to_the_last():
    assert View(frame="grid:4").frames(30, "x") == [0, 10, 19, 29]
    assert View(frame="grid").frames(3, "x") == [0, 1, 2]
    assert len(View(frame="grid").frames(100, "x")) == 16


def test_a_montage_is_filled_row_by_row_and_black_beyond():
    pictures = [np.full((2, 3), value, np.uint8) for value in (1, 2, 3, 4, 5)]
    grid = montage(pictures)
    assert grid[::2, ::3].tolist() == [[1, 2, 3], [4, 5, 0]]
