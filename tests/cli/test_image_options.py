"""The words for windows and frames on the command line."""

import pytest

from moellava.cli.image_options import (
    parse_frame,
    parse_numbers,
    parse_region,
    parse_window,
    part_options,
    view_options,
)
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


def test_numbers_are_how_many_or_that_and_a_range():
    assert parse_numbers("8", "--slices") == 8
    assert parse_numbers("8, 100,-1", "--slices") == {"num": 8, "first": 100, "last": -1}
    for text in ("8,9", "eight", "1,2,3,4", "", "8.5"):
        with pytest.raises(ValueError, match=f"--frames {text}: expected NUMBER or NUMBER,FIRST"):
            parse_numbers(text, "--frames")


def test_regions():
    assert parse_region("10,20,300,400") == {"region": [10, 20, 300, 400], "level": 0}
    assert parse_region("10,20,300,400,2") == {"region": [10, 20, 300, 400], "level": 2}
    with pytest.raises(ValueError, match="--region 10,20: expected X,Y,WIDTH,HEIGHT,LEVEL"):
        parse_region("10,20")


def test_only_the_options_that_were_given_are_passed_on():
    assert part_options(*[None] * 8) == {}
    given = part_options(None, None, "coronal", "4", None, "lung,soft,bone", 6)
    assert given == {
        "plane": "coronal",
        "slices": 4,
        "channels": ["lung", "soft", "bone"],
        "slide": {"max_tiles": 6},
    }
    with pytest.raises(ValueError, match="--slide-tiles and --region are both given"):
        part_options(None, None, None, None, None, None, 6, "1,2,3,4")
