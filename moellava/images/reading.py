"""Any image to a PIL image: files of every kind, encoded bytes, arrays, tensors, PIL images.

| name | gives |
|---|---|
| `load_image` | 8-bit RGB |
| `to_pil` | the same in the mode that the image has, as the encoders' transforms expect it |
| `is_image_file` | whether a file is an image |
"""

import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TypedDict

import numpy as np
from PIL import Image
from typing_extensions import Unpack

from moellava.images.eight_bit import array_to_pil, to_eight_bit
from moellava.images.image_like import ImageLike, ImagePart, is_tensor
from moellava.images.kinds import (
    HEADER_BYTES,
    Decode,
    image_suffixes,
    kind_of_bytes,
    kind_of_file,
    kind_of_object,
)
from moellava.images.picture import decode_picture, seen, windowed
from moellava.images.silence import reason_without_quotes, silent_libraries
from moellava.images.slide import read_region
from moellava.images.view import Frame, View, Window
from moellava.storage.errors import refuse_stand_in


class ViewOptions(TypedDict, total=False):
    """The options of `View`, for functions that pass them on."""

    window: Window | None
    frame: Frame | None
    plane: str | None
    volume: int
    max_pixels: int
    channels: Sequence[Window] | None


def load_image(image: ImageLike, **view: Unpack[ViewOptions]) -> Image.Image:
    """An 8-bit RGB image of a path (DICOM and NIfTI included), bytes, an array or a PIL image.

    Args:
        image: see `to_pil`.
        **view: `window`, `frame`, `plane`, `volume`, `max_pixels` and `channels`; see
            `moellava.images.View`.

    Raises:
        ValueError: unreadable, empty, too large, or without the frame or window asked for; the file
            is named.
    """
    return to_eight_bit(to_pil(image, **view)).convert("RGB")


def to_pil(image: ImageLike, **view: Unpack[ViewOptions]) -> Image.Image:
    """A PIL image, in its own mode, of anything that is an image.

    A PIL image, a path, encoded bytes, a pydicom dataset, a nibabel image, an array or a tensor.
    Arrays are (H, W), (H, W, C) or (C, H, W), of uint8, uint16 (scaled by 65535), bool, or float in
    0..1. DICOM and NIfTI come out in 8 bits; other files in their own mode, until `to_eight_bit`.

    Raises:
        ValueError: an unreadable file, an empty image, or values out of range; a file is named.
        TypeError: something that is not an image.
    """
    return _picture(image, View(**view))


def _picture(image: ImageLike, options: View) -> Image.Image:
    if isinstance(image, ImagePart):
        return _of_part(image, options)
    if isinstance(image, Image.Image):
        return seen(image, options, "The image")
    if isinstance(image, str | os.PathLike):
        return _from_file(Path(image).expanduser(), options)
    if isinstance(image, bytes | bytearray | memoryview):
        return _from_bytes(bytes(image), options)
    if isinstance(image, Mapping) and "bytes" in image and "path" in image:
        stored = image["path"] if image["bytes"] is None else image["bytes"]
        return _picture(stored, options)  # type: ignore[arg-type]  # a TypeError if it is none
    if (kind := kind_of_object(image)) is not None:
        return _decoded(kind.decode, image, options, f"The {kind.name} object")
    if is_tensor(image):
        image = image.detach().cpu()
        image = (image.float() if image.is_floating_point() else image).numpy()
    if isinstance(image, np.ndarray):
        return _from_array(image, options)
    raise TypeError(
        f"Cannot read an image from a {type(image).__name__}; "
        "give a PIL image, a path, bytes, an array or a tensor."
    )


def is_image_file(path: Path) -> bool:
    """Whether a file is an image: by its suffix, or by its first bytes if it has none."""
    if not path.is_file():
        return False
    if path.name.lower().endswith(image_suffixes()):
        return True
    # Names of DICOM files end in numbers, if in anything like a suffix.
    if path.suffix and not path.suffix[1:].isdigit():
        return False
    with path.open("rb") as file:
        return kind_of_bytes(file.read(HEADER_BYTES)) is not None


def _of_part(part: ImagePart, view: View) -> Image.Image:
    if view != View(max_pixels=view.max_pixels):
        raise ValueError("A part of an image is seen as it was chosen. Leave window and frame out.")
    most = min(view.max_pixels, part.view.max_pixels)
    if part.region is None:
        return _picture(part.source, replace(part.view, max_pixels=most))
    name = str(part.source)
    with naming_errors(name):
        return read_region(part.source, part.region, most, name)


def _from_file(path: Path, view: View) -> Image.Image:
    try:
        if path.exists() and not path.is_file():
            hint = " A folder with a DICOM series takes slices=." if path.is_dir() else ""
            raise ValueError(f"{path} is not a regular file, and cannot be read as an image.{hint}")
        with path.open("rb") as file:
            start = file.read(HEADER_BYTES)
    except FileNotFoundError as error:
        raise FileNotFoundError(f"The image {path} does not exist.") from error
    except OSError as error:
        raise ValueError(f"{path} cannot be read as an image: {error}") from error
    kind = kind_of_file(path, start)
    refuse_stand_in(path)
    return _decoded(decode_picture if kind is None else kind.decode, path, view, str(path))


def _from_bytes(data: bytes, view: View) -> Image.Image:
    kind = kind_of_bytes(data[:HEADER_BYTES])
    decode = decode_picture if kind is None else kind.decode
    return _decoded(decode, data, view, "The encoded image")


def _decoded(decode: Decode, source: object, view: View, name: str) -> Image.Image:
    with naming_errors(name):
        return decode(source, view, name)


@contextmanager
def naming_errors(name: str) -> Iterator[None]:
    """Whatever a decoder raises becomes a `ValueError` that begins with the name."""
    try:
        with silent_libraries():
            yield
    except (ImportError, MemoryError):
        raise
    except BaseException as error:
        # Panics of Rust libraries are not Exceptions to Python.
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        if isinstance(error, ValueError) and str(error).startswith(name):
            raise
        # Without the cause: its text may quote what the file holds.
        reason = f"{name} cannot be read as an image: {reason_without_quotes(error)}"
        raise ValueError(reason) from None


def _from_array(array: np.ndarray, view: View) -> Image.Image:
    view.refuse_plane("The array")
    if array.ndim == 2 and (view.window is not None or view.channels is not None):
        return Image.fromarray(view.in_channels(lambda one: windowed(array, one, "The array")))
    return seen(array_to_pil(array), view, "The array")
