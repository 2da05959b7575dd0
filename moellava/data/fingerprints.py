"""Images that are the same, or nearly: exact and perceptual hashes of a dataset's images, each read once."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from moellava.data.images import load_image

HASH_BITS = 64


@dataclass(frozen=True)
class Fingerprint:
    """What tells an image from others.

    Args:
        exact: SHA-256 of the encoded file, or of the pixels where there is none.
        perceptual: (64,) bool, imagehash's phash of the decoded image; it survives resizing and re-encoding.
            None for an image of a single grey value, which resembles every other such image.
    """

    exact: str
    perceptual: np.ndarray | None


def image_key(image: Any) -> str:
    """A name for an image as a row holds it: its path, or the hash of its content."""
    return str(image) if isinstance(image, (str, Path)) else exact_hash(image)


def exact_hash(image: Any) -> str:
    """SHA-256 of a file's content, of encoded bytes, or of an array's or PIL image's pixels."""
    if isinstance(image, (str, Path)):
        with open(image, "rb") as file:
            return (
                hashlib.file_digest(file, "sha256").hexdigest()
                if hasattr(hashlib, "file_digest")
                else _old(file)
            )
    if isinstance(image, bytes):
        return hashlib.sha256(image).hexdigest()
    pixels = np.ascontiguousarray(image)
    return hashlib.sha256(f"{pixels.shape} {pixels.dtype}".encode() + pixels.tobytes()).hexdigest()


def fingerprint(image: Any) -> Fingerprint:
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
    exact = exact_hash(image) if not isinstance(image, (str, Path)) or Path(image).is_file() else ""
    picture: Image.Image = load_image(image)
    is_flat = all(low == high for low, high in picture.getextrema())  # type: ignore[misc]
    return Fingerprint(exact, None if is_flat else imagehash.phash(picture).hash.reshape(-1))


def near_pairs(
    first: Sequence[np.ndarray], second: Sequence[np.ndarray], max_distance: int
) -> list[tuple[int, int, int]]:
    """(i, j, Hamming distance) of the perceptual hashes that differ in at most `max_distance` of 64 bits."""
    if not first or not second:
        return []
    found = []
    right = np.stack(second).astype(np.float32) * 2 - 1  # (M, 64)
    for start in range(
        0, len(first), 1024
    ):  # a block at a time: memory does not grow with the product
        left = np.stack(first[start : start + 1024]).astype(np.float32) * 2 - 1
        distance = (HASH_BITS - left @ right.T) / 2
        for i, j in zip(*np.nonzero(distance <= max_distance), strict=True):
            found.append((start + int(i), int(j), int(distance[i, j])))
    return found


def _old(file: Any) -> str:  # Python 3.10 has no file_digest
    digest = hashlib.sha256()
    while chunk := file.read(1 << 20):
        digest.update(chunk)
    return digest.hexdigest()
