"""Hashes of images against imagehash's own distances."""

import imagehash
import numpy as np
from PIL import Image

from moellava.data.fingerprints import fingerprint, near_pairs
from moellava.testing.datasets import picture


def test_near_pairs_are_those_of_imagehash():
    hashes = [fingerprint(np.asarray(picture(seed))).perceptual for seed in range(12)]
    flipped = [bits.copy() for bits in hashes[:6]]
    for count, bits in enumerate(flipped):
        bits[:count] ^= True
    pairs = {(i, j): distance for i, j, distance in near_pairs(hashes, flipped, 4)}
    expected = {
        (i, j): distance
        for i, left in enumerate(hashes)
        for j, right in enumerate(flipped)
        if (distance := imagehash.ImageHash(left) - imagehash.ImageHash(right)) <= 4
    }
    assert pairs == expected
    assert len(pairs) == 5


def test_a_flat_image_has_no_perceptual_hash_and_another_palette_another_exact_one():
    assert fingerprint(np.full((20, 30), 7, np.uint8)).perceptual is None
    indices = np.resize(np.arange(256, dtype=np.uint8), (40, 40))
    inverted = Image.fromarray(indices, mode="P")
    inverted.putpalette(np.arange(255, -1, -1, dtype=np.uint8).repeat(3).tobytes())
    plain = fingerprint(Image.fromarray(indices))
    assert plain.perceptual is not None
    assert plain.exact != fingerprint(inverted).exact
