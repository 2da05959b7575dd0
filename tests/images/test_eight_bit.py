"""Grey values and arrays become 8 bits."""

import numpy as np
import pytest
from PIL import Image

from moellava.images.eight_bit import array_to_pil, by_rows, to_eight_bit

SIXTEEN = np.arange(65536, dtype=np.uint16).reshape(256, 256)


@pytest.mark.parametrize("mode", ["I;16", "I"])
def test_sixteen_bits_are_scaled_by_their_range(mode):
    image = Image.fromarray(SIXTEEN if mode == "I;16" else SIXTEEN.astype(np.int32))
    assert image.mode == mode
    expected = np.rint(SIXTEEN.astype(np.float64) / 65535 * 255)
    assert np.array_equal(np.asarray(to_eight_bit(image)), expected)
    assert np.array_equal(np.asarray(array_to_pil(SIXTEEN)), expected)


@pytest.mark.parametrize("values", [[[-1, 5]], [[0, 65536]]])
def test_values_beyond_sixteen_bits_are_refused(values):
    with pytest.raises(ValueError, match=r"expected 16 bits, 0 to 65535.*Apply a window"):
        to_eight_bit(Image.fromarray(np.array(values, np.int32)))


@pytest.mark.parametrize("mode", ["1", "P", "PA", "L", "LA", "RGB", "RGBA", "CMYK"])
def test_other_modes_are_what_pillow_makes_of_them(mode):
    picture = Image.effect_noise((20, 10), 90).convert("RGB").convert(mode)
    expected = {"1": "L", "P": "RGB", "PA": "RGB"}.get(mode, mode)
    found = to_eight_bit(picture)
    assert found.mode == expected
    assert found.tobytes() == picture.convert(expected).tobytes()


def test_float_is_from_0_to_1():
    values = np.array([[0.0, 0.5, 1.0]], np.float32)
    assert np.asarray(to_eight_bit(Image.fromarray(values))).tolist() == [[0, 128, 255]]


@pytest.mark.parametrize("values", [[[0.0, 1.5]], [[-0.1, 0.0]], [[float("nan"), 0.0]]])
def test_float_of_another_range_is_refused(values):
    with pytest.raises(ValueError, match="expected 0 to 1"):
        array_to_pil(np.array(values))


@pytest.mark.parametrize("shape", [(6, 7), (6, 7, 3), (6, 7, 4)])
def test_channels_come_first_or_last(shape):
    array = np.random.default_rng(0).integers(0, 255, shape, np.uint8)
    assert np.array_equal(np.asarray(array_to_pil(array)), array)
    first = array[None] if array.ndim == 2 else np.moveaxis(array, -1, 0)
    assert np.array_equal(np.asarray(array_to_pil(first)), array)


def test_true_is_white():
    assert np.asarray(array_to_pil(np.array([[True, False]]))).tolist() == [[255, 0]]


@pytest.mark.parametrize(
    ("array", "message"),
    [
        (np.zeros((2, 3, 4, 5), np.uint8), r"shape \(2, 3, 4, 5\)"),
        (np.zeros((6, 7, 5), np.uint8), r"shape \(6, 7, 5\)"),
        (np.zeros((0, 7), np.uint8), r"shape \(0, 7\)"),
        (np.zeros((6, 7), np.int64), "dtype int64"),
    ],
)
def test_what_is_no_image_is_named(array, message):
    with pytest.raises(ValueError, match=message):
        array_to_pil(array)


@pytest.mark.parametrize("shape", [(3000, 1000), (1, 3_000_000), (5, 0)])
def test_blocks_of_rows_are_the_whole(shape):
    values = np.random.default_rng(0).integers(0, 60000, shape)
    found = by_rows(lambda rows: (rows // 256).astype(np.uint8), values)
    assert np.array_equal(found, values // 256)
