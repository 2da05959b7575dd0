"""Maps on their pictures."""

import numpy as np
import pytest
from PIL import Image

from moellava.explain import KINDS


@pytest.mark.parametrize("kind", KINDS)
def test_overlays_are_written(explanation, kind, tmp_path):
    figure = explanation.draw_overlay(tmp_path / "map.png", kind=kind)
    has_blank = kind in ("attention", "rollout")
    assert len(figure.axes) == (4 if has_blank else 3)  # panels and a colour bar
    with Image.open(tmp_path / "map.png") as written:
        assert min(written.size) > 200


def test_the_hot_patch_of_a_figure_is_on_its_pixels(explanation):
    """Read from what matplotlib draws, not from the numbers that were given to it."""
    from moellava.explain.drawing.overlays import draw_overlay

    values = np.zeros((10, 10), dtype=np.float32)
    values[3, 7] = 1
    figure = draw_overlay(
        Image.new("RGB", (300, 180)),
        explanation.frames[0],
        values,
        None,
        title="",
        label="",
        is_signed=False,
    )
    drawn = figure.axes[1].images[1]
    colours = drawn.get_array()
    rows, columns = np.nonzero(colours[..., 3] > 0.6)
    assert drawn.get_extent() == [0, 300, 180, 0]
    # Patches are 18 pixels, and the crop starts at 60.
    assert (columns.min(), columns.max() + 1) == pytest.approx((60 + 7 * 18, 60 + 8 * 18), abs=2)
    assert (rows.min(), rows.max() + 1) == pytest.approx((3 * 18, 4 * 18), abs=2)


@pytest.mark.parametrize("size", [(1200, 150), (150, 1200)], ids=["wide", "tall"])
def test_a_long_picture_fits_a_page(size):
    from moellava.explain.drawing.overlays import draw_overlay
    from moellava.explain.frames import Frame

    frame = Frame(left=0, top=0, right=size[0], bottom=size[1], width=size[0], height=size[1])
    values = np.eye(4, dtype=np.float32)
    figure = draw_overlay(
        Image.new("RGB", size), frame, values, values, title="", label="", is_signed=False
    )
    assert figure.get_figwidth() < 10
    assert figure.get_figheight() < 8


def test_both_maps_share_one_scale(explanation):
    figure = explanation.draw_overlay()
    largest = max(explanation.map().max(), explanation.map(blank=True).max())
    assert figure.axes[-1].get_ylim() == pytest.approx((0, largest))
