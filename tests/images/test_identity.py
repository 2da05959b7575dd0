"""Which images are the same: the same pixels with another meaning are not."""

import hashlib

import numpy as np
import pytest
import torch
from PIL import Image

from moellava.images import exact_hash, image_key

INDICES = np.arange(256, dtype=np.uint8).reshape(16, 16)


def with_palette(colours: np.ndarray) -> Image.Image:
    image = Image.fromarray(INDICES, mode="P")
    image.putpalette(colours.repeat(3).tobytes())
    return image


def test_a_grey_picture_and_one_with_an_inverted_palette_differ():
    grey = Image.fromarray(INDICES)
    inverted = with_palette(INDICES.reshape(-1)[::-1])
    assert np.array_equal(np.asarray(grey), np.asarray(inverted))
    assert exact_hash(grey) != exact_hash(inverted)
    assert image_key(grey) != image_key(inverted)


def test_two_palettes_make_two_pictures():
    plain, inverted = (
        with_palette(row) for row in (INDICES.reshape(-1), INDICES.reshape(-1)[::-1])
    )
    assert exact_hash(plain) != exact_hash(inverted)
    assert exact_hash(plain) == exact_hash(with_palette(INDICES.reshape(-1)))


@pytest.mark.parametrize(("one", "other"), [("RGB", "HSV"), ("RGB", "YCbCr"), ("RGBA", "CMYK")])
def test_colours_of_two_modes_differ(one, other):
    channels = len(Image.new(one, (1, 1)).getbands())
    data = INDICES.repeat(channels).tobytes()
    assert exact_hash(Image.frombytes(one, (16, 16), data)) != exact_hash(
        Image.frombytes(other, (16, 16), data)
    )


def test_arrays_of_another_shape_or_type_differ_and_a_tensor_is_its_array():
    assert exact_hash(INDICES) != exact_hash(INDICES.reshape(8, 32))
    assert exact_hash(INDICES) != exact_hash(INDICES.view(np.int8))
    assert exact_hash(INDICES) == exact_hash(torch.from_numpy(INDICES))
    assert exact_hash(INDICES.T) == exact_hash(INDICES.T.copy())


def test_a_file_and_its_bytes_are_the_same_by_content_and_found_by_their_own_key(tmp_path):
    path = tmp_path / "a.png"
    Image.fromarray(INDICES).save(path)
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    assert exact_hash(path) == exact_hash(str(path)) == exact_hash(path.read_bytes()) == digest
    assert image_key(path) == image_key(str(path)) == str(path)
    assert image_key(path.read_bytes()) == f"sha256:{digest}"
