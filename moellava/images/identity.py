"""Which images are the same: `exact_hash` of what an image holds, `image_key` to find it again."""

import hashlib
import os
from pathlib import Path

import numpy as np
from PIL import Image

from moellava.images.image_like import ImageLike, ImagePart, is_tensor

_CHUNK = 1 << 20  # bytes of a file in memory at a time


def image_key(image: ImageLike) -> str:
    """A name for an image as a row holds it: its path, or the hash of its content."""
    if isinstance(image, ImagePart):
        return f"{image_key(image.source)}{image.suffix}"
    if isinstance(image, str | os.PathLike):
        return os.fspath(image)
    return f"sha256:{exact_hash(image)}"


def exact_hash(image: ImageLike) -> str:
    """SHA-256 of a file's content, of encoded bytes, or of the pixels of an array or a PIL image.

    Pixels go with their shape, type, mode and palette: the same numbers are another picture under
    another palette. A part of an image has the hash of its source and of how it is seen.
    """
    if isinstance(image, ImagePart):
        whole = exact_hash(image.source)
        if not image.suffix:
            return whole
        return hashlib.sha256(f"{whole}{image.suffix}".encode()).hexdigest()
    if isinstance(image, str | os.PathLike):
        return _file_hash(Path(image))
    if isinstance(image, bytes | bytearray | memoryview):
        return hashlib.sha256(image).hexdigest()
    meaning = b""
    if isinstance(image, Image.Image):
        meaning = image.mode.encode() + bytes(image.getpalette() or ())
    elif is_tensor(image):
        image = image.detach().cpu().numpy()
    pixels = np.ascontiguousarray(image)
    form = f"{pixels.shape} {pixels.dtype} ".encode() + meaning
    return hashlib.sha256(form + pixels.tobytes()).hexdigest()


def _file_hash(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK):
            digest.update(chunk)
    return digest.hexdigest()
