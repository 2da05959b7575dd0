"""Frames against pictures whose content says where it lies."""

import numpy as np
import pytest
from PIL import Image, ImageOps
from transformers import BitImageProcessor, CLIPImageProcessor, SiglipImageProcessor

from moellava.encoders import BiomedClipImageProcessor
from moellava.explain.frames import Frame, measure_frame
from moellava.images import to_eight_bit

PROCESSORS = {
    "open_clip": BiomedClipImageProcessor.from_open_clip({}, 224),
    "open_clip padded": BiomedClipImageProcessor.from_open_clip({"resize_mode": "longest"}, 224),
    "open_clip padded white": BiomedClipImageProcessor.from_open_clip(
        {"resize_mode": "longest", "fill_color": 255}, 224
    ),
    "open_clip squashed, not square": BiomedClipImageProcessor.from_open_clip(
        {"resize_mode": "squash"}, (160, 224)
    ),
    "CLIP": CLIPImageProcessor(),
    "SigLIP": SiglipImageProcessor(),
    "DINOv2": BitImageProcessor(
        size={"shortest_edge": 256}, crop_size={"height": 224, "width": 224}
    ),
}
SIZES = {"square": (256, 256), "wide": (700, 210), "tall": (210, 700), "tiny": (40, 30)}


def hottest_patch(processor, picture, grid):
    """The patch in which a picture differs most from a dark one, as the model gets them."""
    dark = Image.new("RGB", picture.size)
    both = [to_eight_bit(picture).convert("RGB"), dark]
    with_it, without = processor(images=both, return_tensors="pt")["pixel_values"].numpy()
    pixels = np.abs(with_it - without).sum(0)
    rows, columns = grid
    height, width = pixels.shape[0] // rows, pixels.shape[1] // columns
    blocks = pixels[: rows * height, : columns * width].reshape(rows, height, columns, width)
    return np.unravel_index(blocks.sum((1, 3)).argmax(), grid)


def with_spot(size, center, side, mode):
    """A dark picture with a bright square; in 16 bits, one that an 8-bit reader would clamp."""
    width, height = size
    values = np.zeros((height, width), dtype=np.uint16)
    left, top = int(center[0] - side / 2), int(center[1] - side / 2)
    values[top : top + side, left : left + side] = 255
    if mode == "I;16":
        return Image.fromarray(values * 200)
    return Image.fromarray(values.astype(np.uint8)).convert(mode)


@pytest.mark.parametrize("mode", ["RGB", "I;16"])
@pytest.mark.parametrize("shape", SIZES)
@pytest.mark.parametrize("name", PROCESSORS)
def test_a_hot_patch_lands_on_the_pixels_that_made_it_hot(name, shape, mode):
    size, grid = SIZES[shape], (8, 7)
    frame = measure_frame(PROCESSORS[name], size)
    left, top, right, bottom = frame.visible
    for share_x, share_y in ((0.25, 0.3), (0.8, 0.55)):
        # The centre of a patch well inside what is seen.
        row, column = frame.cell_of(
            left + share_x * (right - left), top + share_y * (bottom - top), grid
        )
        x = frame.left + (column + 0.5) / grid[1] * (frame.right - frame.left)
        y = frame.top + (row + 0.5) / grid[0] * (frame.bottom - frame.top)
        side = max(2, int(min(right - left, bottom - top) / 16))
        spotted = with_spot(size, (x, y), side, mode)
        hot = hottest_patch(PROCESSORS[name], spotted, grid)
        assert hot == (row, column)
        values = np.zeros(grid, dtype=np.float32)
        values[hot] = 1
        placed = frame.place(values)
        is_spot = np.asarray(spotted.convert("L") if mode == "RGB" else spotted) > 0
        assert placed[is_spot].mean() > 0.9  # the spot is under the hot patch
        seen = (right - left) * (bottom - top)
        assert np.nansum(placed) < 4 * seen / (grid[0] * grid[1])  # and little else is


@pytest.mark.parametrize(
    ("size", "box"),
    [
        ((1000, 300), (350, 0, 650, 300)),
        ((300, 1000), (0, 350, 300, 650)),
        ((4000, 300), (1850, 0, 2150, 300)),
        ((224, 224), (0, 0, 224, 224)),
    ],
)
def test_a_centre_crop_is_the_middle_square(size, box):
    frame = measure_frame(PROCESSORS["open_clip"], size)
    found = (frame.left, frame.top, frame.right, frame.bottom)
    assert found == pytest.approx(box, abs=300 / 224)  # within one pixel of the model's input


def test_nothing_is_drawn_where_the_model_saw_nothing():
    frame = Frame(left=20, top=0, right=80, bottom=60, width=100, height=60)
    placed = frame.place(np.ones((2, 2), dtype=np.float32))
    assert np.isnan(placed[:, :20]).all()
    assert np.isnan(placed[:, 80:]).all()
    assert (placed[:, 20:80] == 1).all()
    assert frame.cell_of(10, 10, (2, 2)) is None
    assert frame.cell_of(21, 59, (2, 2)) == (1, 0)


def test_padding_lies_beyond_the_picture():
    frame = measure_frame(PROCESSORS["open_clip padded"], (200, 100))
    assert frame.top == pytest.approx(-50, abs=1)
    assert frame.bottom == pytest.approx(150, abs=1)
    assert frame.visible == pytest.approx((0, 0, 200, 100), abs=1)


def test_smooth_maps_keep_their_peak_and_their_range():
    frame = Frame(left=0, top=0, right=40, bottom=40, width=40, height=40)
    values = np.array([[0, 0], [0, 1]], dtype=np.float32)
    placed = frame.place(values, smooth=True)
    assert placed[30, 30] == pytest.approx(1, abs=0.06)
    assert placed.min() == 0
    assert 0.2 < placed[20, 20] < 0.3  # the middle of the four


def test_a_smaller_drawing_has_the_same_places():
    frame = Frame(left=25, top=0, right=75, bottom=50, width=100, height=50)
    values = np.arange(4, dtype=np.float32).reshape(2, 2)
    small = frame.place(values, size=(20, 10))
    np.testing.assert_array_equal(small, frame.place(values)[2::5, 2::5])


def test_a_mirroring_processor_is_refused():
    def mirrored(images, return_tensors):
        return PROCESSORS["CLIP"]([ImageOps.mirror(image) for image in images], return_tensors="pt")

    with pytest.raises(ValueError, match="turns or mirrors"):
        measure_frame(mirrored, (100, 80))
