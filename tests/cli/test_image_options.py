"""The words for windows and frames on the command line."""

import pytest

from moellava.cli.image_options import parse_frame, parse_window, view_options
from moellava.images import View


@pytest.mark.parametrize(
    ("text", "window"),
    [
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
    assert [parse_frame(text) for text in ("3", "-1", "grid", "grid:9")] == [
        3,
        -1,
        "grid",
        "grid:9",
    ]


def test_only_what_was_given_is_passed_on_and_it_is_checked():
    assert view_options(None, None, None) == {}
    assert view_options("40,400", "grid:9", "coronal") == {
        "window": (40, 400),
        "frame": "grid:9",
        "plane": "coronal",
    }
    with pytest.raises(ValueError, match=r"Unknown plane 'axail'. Did you mean 'axial'"):
        view_options(None, None, "axail")
