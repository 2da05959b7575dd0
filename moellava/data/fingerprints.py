"""Images that are the same, or nearly: exact and perceptual hashes, each image read once."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from moellava.images import ImageLike, exact_hash, load_image

HASH_BITS = 64
_BLOCK = 1024  # hashes compared at a time: memory does not grow with the product


@dataclass(frozen=True)
class Fingerprint:
    """What tells an image from others.

    Args:
        exact: see `moellava.images.exact_hash`.
        perceptual: (64,) bool, imagehash's phash of the decoded image; it survives resizing and
            re-encoding. None for an image of a single grey value, which resembles every other such
            image.
    """

    exact: str
    perceptual: np.ndarray | None


def fingerprint(image: ImageLike) -> Fingerprint:
    """Read an image and hash it.

    Raises:
        ValueError, OSError: it cannot be read, see `load_image`.
    """
    try:
        import imagehash
    except ImportError as error:
        raise ImportError(
            "Comparing images needs ImageHash. Type: pip install 'moellava[data]'"
        ) from error
    is_missing = isinstance(image, str | Path) and not Path(image).is_file()
    exact = "" if is_missing else exact_hash(image)
    pixels = np.asarray(picture := load_image(image))
    is_flat = bool((pixels == pixels[0, 0]).all())
    return Fingerprint(exact, None if is_flat else imagehash.phash(picture).hash.reshape(-1))


def near_pairs(
    first: Sequence[np.ndarray], second: Sequence[np.ndarray], max_distance: int
) -> list[tuple[int, int, int]]:
    """(i, j, Hamming distance) of perceptual hashes that differ in at most `max_distance` bits."""
    if not first or not second:
        return []
    found = []
    right = np.stack(second).astype(np.float32) * 2 - 1  # (M, 64)
    for start in range(0, len(first), _BLOCK):
        left = np.stack(first[start : start + _BLOCK]).astype(np.float32) * 2 - 1
        distance = (HASH_BITS - left @ right.T) / 2
        for i, j in zip(*np.nonzero(distance <= max_distance), strict=True):
            found.append((start + int(i), int(j), int(distance[i, j])))
    return found
