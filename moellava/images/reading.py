"""Any image to a PIL image: files (DICOM and NIfTI among them), encoded bytes, arrays, tensors, PIL images.

`to_pil` for all of them, `read_image` for files, `to_eight_bit` (16-bit and palette images, deliberately).
"""

import io
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError

from moellava.images.dicom import decode_dicom
from moellava.images.nifti import decode_nifti
from moellava.images.view import View, window_to_eight_bit

DICOM_SUFFIXES = (".dcm", ".dicom", ".ima")
NIFTI_SUFFIXES = (".nii", ".nii.gz")
IMAGE_SUFFIXES = (
    *(".png", ".jpg", ".jpeg", ".tif", ".tiff", ".bmp", ".gif", ".webp"),
    *DICOM_SUFFIXES,
    *NIFTI_SUFFIXES,
)

# Modes that open_clip's transform resizes as they are; everything else is brought to 8 bits first.
_RESIZED_AS_THEY_ARE = ("L", "LA", "RGB", "RGBA", "RGBX", "CMYK", "YCbCr", "HSV", "LAB")
_PREAMBLE = 128  # bytes before the word DICM


def to_pil(image: Any, **view: Any) -> Image.Image:
    """A PIL image of a PIL image, a path, encoded bytes, a pydicom dataset, a nibabel image, or an array or tensor.

    Arrays are (H, W), (H, W, C) or (C, H, W), of uint8, uint16 (scaled by 65535), bool, or float in 0..1.
    DICOM and NIfTI come out in 8 bits; other files as they are, until `to_eight_bit`.

    Args:
        **view: `window`, `frame`, `plane`, `volume`, `max_pixels`; see `moellava.images.View`.

    Raises:
        ValueError: an unreadable file, an empty image, or values out of range; a file is named.
    """
    options = View(**view)
    if isinstance(image, Image.Image):
        return _chosen(image, options, "The image")
    if isinstance(image, (str, Path)):
        return read_image(image, **view)
    if isinstance(image, (bytes, bytearray, memoryview)):
        return _from_bytes(bytes(image), options, "The encoded image")
    if (
        isinstance(image, Mapping) and "bytes" in image and "path" in image
    ):  # the hub's images, not decoded
        return to_pil(image["path"] if image["bytes"] is None else image["bytes"], **view)
    library = type(image).__module__.partition(".")[0]
    if library in ("pydicom", "highdicom"):
        return Image.fromarray(decode_dicom(image, options, "The dataset"))
    if library == "nibabel":
        return Image.fromarray(decode_nifti(image, options, "The volume"))
    if isinstance(image, torch.Tensor):
        image = (
            image.detach().cpu().float().numpy()
            if image.is_floating_point()
            else image.cpu().numpy()
        )
    if isinstance(image, np.ndarray):
        if options.window is not None and image.ndim == 2:
            return Image.fromarray(_windowed(image, options, "The array"))
        return _chosen(array_to_pil(image), options, "The array")
    raise TypeError(
        f"Cannot read an image from a {type(image).__name__}; give a PIL image, a path, bytes, an array or a tensor."
    )


def read_image(path: str | Path, **view: Any) -> Image.Image:
    """Open and decode an image file of any kind; every failure names the file. For `view` see `to_pil`."""
    path, options = Path(path).expanduser(), View(**view)
    try:
        with path.open("rb") as file:
            start = file.read(_PREAMBLE + 4)
    except FileNotFoundError as error:
        raise FileNotFoundError(f"The image {path} does not exist.") from error
    except OSError as error:
        raise ValueError(f"{path} cannot be read as an image: {error}") from error
    name = path.name.lower()
    if start[_PREAMBLE:] == b"DICM" or name.endswith(DICOM_SUFFIXES) or name == "dicomdir":
        return Image.fromarray(decode_dicom(path, options, str(path)))
    if name.endswith(NIFTI_SUFFIXES):
        return Image.fromarray(decode_nifti(path, options, str(path)))
    return _open(path, options, str(path))


def is_image_file(path: Path) -> bool:
    """Whether a file is an image: by its suffix, or as DICOM (which often has none) by its first bytes."""
    if not path.is_file():
        return False
    if path.name.lower().endswith(IMAGE_SUFFIXES):
        return True
    if (
        path.suffix and not path.suffix[1:].isdigit()
    ):  # names of DICOM files end in numbers, if in anything
        return False
    with path.open("rb") as file:
        return file.read(_PREAMBLE + 4)[_PREAMBLE:] == b"DICM"


def to_eight_bit(image: Image.Image) -> Image.Image:
    """Bring palette, bilevel, 16-bit and float images to 8 bits; 8-bit images come back as they are.

    16-bit grey is scaled by the range of its type (0..65535 to 0..255), never clamped and never stretched to
    the image's own extremes, so the same grey value gives the same result in every image.
    """
    if image.mode in _RESIZED_AS_THEY_ARE:
        return image
    if image.mode == "1":
        return image.convert("L")
    if image.mode.startswith(
        "I"
    ):  # "I;16", its byte orders, and "I", as which some 16-bit files open
        values = np.asarray(image, dtype=np.int64)
        low, high = int(values.min()), int(values.max())
        if low < 0 or high > 65535:
            raise ValueError(
                f"The {image.mode!r} image has values {low} to {high}; expected 16 bits, 0 to 65535. "
                "Apply a window first, so that 8 bits hold what matters."
            )
        return Image.fromarray(((values * 255 + 32767) // 65535).astype(np.uint8))
    if image.mode == "F":
        return array_to_pil(np.asarray(image))
    return image.convert(
        "RGB"
    )  # "P", "PA" and the rest: colours, not indices, are what resizing may mix


def array_to_pil(array: np.ndarray) -> Image.Image:
    """An 8-bit PIL image of an array (H, W), (H, W, C) or (C, H, W); see `to_pil`."""
    if array.ndim == 3 and array.shape[0] in (1, 3, 4) and array.shape[2] not in (1, 3, 4):
        array = np.moveaxis(array, 0, -1)
    if array.ndim == 3 and array.shape[2] == 1:
        array = array[:, :, 0]
    if (
        array.ndim not in (2, 3)
        or (array.ndim == 3 and array.shape[2] not in (3, 4))
        or 0 in array.shape
    ):
        raise ValueError(
            f"An image array has shape {array.shape}; expected (H, W), or 1, 3 or 4 channels first or last."
        )
    if array.dtype == np.bool_:
        array = array.astype(np.uint8) * 255
    elif array.dtype == np.uint16:
        array = ((array.astype(np.uint32) * 255 + 32767) // 65535).astype(np.uint8)
    elif np.issubdtype(array.dtype, np.floating):
        low, high = float(array.min()), float(array.max())
        if not (low >= 0 and high <= 1):  # also false for NaN
            raise ValueError(f"A float image has values {low:g} to {high:g}; expected 0 to 1.")
        array = np.rint(array * 255).astype(np.uint8)
    elif array.dtype != np.uint8:
        raise ValueError(
            f"An image array has dtype {array.dtype}; expected uint8, uint16, or float in 0..1."
        )
    return Image.fromarray(np.ascontiguousarray(array))


def _from_bytes(data: bytes, view: View, name: str) -> Image.Image:
    if data[_PREAMBLE : _PREAMBLE + 4] == b"DICM":
        return Image.fromarray(decode_dicom(data, view, name))
    return _open(io.BytesIO(data), view, name)


def _open(source: Path | io.BytesIO, view: View, name: str) -> Image.Image:
    try:
        with Image.open(source) as image:
            view.check_size(*image.size, name)  # Pillow has read the header only
            chosen = _chosen(image, view, name)
            chosen.load()
            return chosen.copy() if chosen is image and image.fp is not None else chosen
    except Image.DecompressionBombError as error:
        raise ValueError(
            f"{name} is larger than Pillow's limit: {error} Give it smaller, or set PIL.Image.MAX_IMAGE_PIXELS."
        ) from error
    except (UnidentifiedImageError, OSError, SyntaxError, EOFError) as error:
        raise ValueError(f"{name} cannot be read as an image: {error}") from error


def _chosen(image: Image.Image, view: View, name: str) -> Image.Image:
    """The frame asked for of an animation or a TIFF (by default the first), seen through the window."""
    view.check_size(*image.size, name)
    count = getattr(image, "n_frames", 1) if view.frame is not None else 1
    if view.frame is not None:
        frames = view.frames(count, name, default=0)
        if len(frames) > 1:
            return _grid(image, frames, view, name)
        if count > 1:
            image.seek(frames[0])
    if view.window is None:
        return image
    return Image.fromarray(_windowed(np.asarray(image), view, name))


def _grid(image: Image.Image, frames: list[int], view: View, name: str) -> Image.Image:
    pictures = []
    for frame in frames:
        image.seek(frame)
        shown = (
            image
            if view.window is None
            else Image.fromarray(_windowed(np.asarray(image), view, name))
        )
        pictures.append(to_eight_bit(shown).convert("RGB"))
    width, height = (
        max(sizes) for sizes in zip(*(picture.size for picture in pictures), strict=True)
    )
    view.check_size(width * len(frames), height, name)
    columns = int(np.ceil(np.sqrt(len(frames))))
    grid = Image.new("RGB", (columns * width, -(-len(frames) // columns) * height))
    for index, picture in enumerate(pictures):
        grid.paste(picture, (index % columns * width, index // columns * height))
    return grid


def _windowed(values: np.ndarray, view: View, name: str) -> np.ndarray:
    if values.ndim != 2:
        raise ValueError(f"{name} is in colour; a window is for grey images. Leave window out.")
    if view.window == "full":
        return np.asarray(to_eight_bit(Image.fromarray(values)))
    limits = view.limits()
    if limits is None:
        raise ValueError(
            f"{name} has no windows of its own to number. Give (center, width) or a preset."
        )
    return window_to_eight_bit(values, *limits)
