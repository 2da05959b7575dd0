"""A NIfTI volume → one slice, or a grid of them, in 8 bits, through nibabel.

Slices are cut in canonical orientation (right, anterior, superior) whatever the file's own, and
shown as radiologists see them: the patient's right on the left, front or head at the top. Slice 0
is the one furthest to the left, back or feet. Only the slices that are shown are read.
"""

import gzip
import io
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from moellava.images.image_like import NiftiVolume
from moellava.images.optional import load_optional
from moellava.images.silence import reason_without_quotes, silent_libraries
from moellava.images.view import (
    PLANES,
    View,
    grid_shape,
    montage,
    percentile_range,
    range_to_eight_bit,
    value_counts,
    window_to_eight_bit,
)
from moellava.storage.limits import limit, require_within

_GZIP = b"\x1f\x8b"
_RAW_COLOUR = ("R", "G", "B")
_SQUARE = 0.01  # pixels whose sides differ by less are taken for square


def decode_nifti(source: Path | bytes | NiftiVolume, view: View, name: str) -> Image.Image:
    """An "L" or "RGB" picture of a `.nii` or `.nii.gz` file, of its bytes, or of a nibabel image.

    Grey values are those after the header's scaling. Without a window the header's display range is
    used, else the 0.5th to 99.5th percentile of what is shown. Pixels that are not square are made
    so.

    Raises:
        ImportError: nibabel is not installed.
        ValueError: broken, no such slice or volume.
    """
    load_optional("nibabel", f"{name} is a NIfTI file", extra="nifti")
    try:
        with silent_libraries():
            image = _opened(source)
            slices, zooms = _slices(image, view, name)
    except MemoryError:
        raise
    # nibabel and zlib raise whatever a broken file leads them to, and may quote its texts.
    except Exception as error:
        if isinstance(error, ValueError) and str(error).startswith(name):  # one of ours
            raise
        raise ValueError(
            f"{name} cannot be read as NIfTI: it is cut off or broken "
            f"({reason_without_quotes(error)})"
        ) from None
    # (S, H, W[, 3])
    shown = view.in_channels(lambda one: np.stack(_eight_bits(slices, image, one, name)))
    pictures = (_square(picture, zooms) for picture in shown)
    return Image.fromarray(np.ascontiguousarray(montage(pictures, len(shown))))


def plane_sizes(source: Path | bytes | NiftiVolume, name: str) -> dict[str, int]:
    """The number of slices in each of `PLANES`; only the header is read.

    Raises:
        ImportError: nibabel is not installed.
        ValueError: the affine gives no orientation.
    """
    nibabel = load_optional("nibabel", f"{name} is a NIfTI file", extra="nifti")
    image = _opened(source)
    orientation = nibabel.io_orientation(image.affine)
    if np.isnan(orientation).any() or len(image.shape) < 3:
        raise ValueError(
            f"{name} has an affine that gives no orientation. Set its sform or qform first."
        )
    natives = {int(axis): native for native, axis in enumerate(orientation[:, 0])}
    return {plane: int(image.shape[natives[axis]]) for plane, axis in PLANES.items()}


def _opened(source: Path | bytes | NiftiVolume) -> NiftiVolume:
    nibabel = load_optional("nibabel", "This is a NIfTI file", extra="nifti")
    image: NiftiVolume
    if isinstance(source, Path):
        image = nibabel.load(source)
    elif isinstance(source, bytes):
        data = _gunzipped(source) if source.startswith(_GZIP) else source
        is_second = data[4:8] == b"n+2\0"
        image = (nibabel.Nifti2Image if is_second else nibabel.Nifti1Image).from_bytes(data)
    else:
        image = source
    return image


def _gunzipped(source: bytes) -> bytes:
    with gzip.GzipFile(fileobj=io.BytesIO(source)) as file:
        data = file.read(limit("unpacked") + 1)
    require_within("unpacked", len(data), "The encoded image")
    return data


def _slices(
    image: NiftiVolume, view: View, name: str
) -> tuple[list[np.ndarray], tuple[float, float]]:
    """Slices (rows, columns) as radiologists see them, and the (row, column) size of a pixel."""
    nibabel = load_optional("nibabel", f"{name} is a NIfTI file", extra="nifti")
    shape = tuple(image.shape)
    while len(shape) > 3 and shape[-1] == 1:
        shape = shape[:-1]
    if len(shape) not in (3, 4):
        raise ValueError(
            f"{name} has the shape {image.shape}; expected a volume of 3 axes, or 4 with time."
        )
    if not 0 <= view.volume < (shape[3] if len(shape) == 4 else 1):
        raise ValueError(
            f"{name} has no volume {view.volume}: it has {shape[3] if len(shape) == 4 else 1}."
        )
    orientation = nibabel.io_orientation(image.affine)
    if np.isnan(orientation).any():
        raise ValueError(
            f"{name} has an affine that gives no orientation. Set its sform or qform first."
        )
    axis = PLANES[view.plane or "axial"]
    native = int(np.flatnonzero(orientation[:, 0] == axis)[0])
    others = [index for index in range(3) if index != axis]
    by_canonical = {int(canonical): index for index, canonical in enumerate(orientation[:, 0])}
    across, up = (by_canonical[index] for index in others)
    view.check_size(shape[across], shape[up], name)
    sizes = np.sqrt((np.asarray(image.affine)[:3, :3] ** 2).sum(axis=0))
    zooms = float(sizes[up]), float(sizes[across])
    height, width = _square_size((shape[up], shape[across]), zooms)
    view.check_size(width, height, name)
    frames = view.frames(shape[native], name)
    rows, columns = grid_shape(len(frames))
    view.check_size(columns * width, rows * height, name)
    # nibabel reads all of a volume for slices across the axis that varies fastest.
    count = shape[native] if native == 0 else len(frames)
    bytes_each = max(8, np.dtype(image.dataobj.dtype).itemsize)  # 8 once values are scaled
    require_within("frame", shape[across] * shape[up] * count * bytes_each, name)

    slices = []
    for number in frames:
        # Counted from left, back or feet; the file may run the other way.
        place = number if orientation[native, 1] > 0 else shape[native] - 1 - number
        cut: list[slice | int] = [slice(None)] * 3
        cut[native] = slice(place, place + 1)
        cut += [view.volume] * (len(shape) - 3) + [0] * (len(image.shape) - len(shape))
        values = np.asanyarray(image.dataobj[tuple(cut)])
        # (first other axis, second other axis)
        flat = nibabel.apply_orientation(values, orientation).squeeze(axis)
        slices.append(flat[::-1, ::-1].T)
    return slices, zooms


def _eight_bits(
    slices: Sequence[np.ndarray], image: NiftiVolume, view: View, name: str
) -> list[np.ndarray]:
    dtype = slices[0].dtype
    if dtype.names is not None:  # NIfTI's RGB24
        if view.window is not None:
            raise ValueError(f"{name} is in colour; a window is for grey images. Leave window out.")
        return [np.stack([cut[channel] for channel in _RAW_COLOUR], axis=-1) for cut in slices]
    if dtype.kind == "c":
        raise ValueError(f"{name} holds complex numbers; save their magnitude first.")
    if isinstance(view.window, int):
        raise ValueError(
            f"{name}: a NIfTI file has no windows to number. Give (center, width) or a preset."
        )
    view.refuse_preset(dtype, name)
    if (limits := view.limits()) is not None:
        return [window_to_eight_bit(cut, *limits) for cut in slices]
    if dtype == np.uint8:  # without scaling, or nibabel would have made it float
        return list(slices)
    low, high = (float(image.header.get(key, 0)) for key in ("cal_min", "cal_max"))
    if view.window == "full":
        if dtype.kind not in "ui":
            raise ValueError(
                f"{name} holds numbers of type {dtype}, which have no full range. Give a window."
            )
        low, high = np.iinfo(dtype).min, np.iinfo(dtype).max
    elif not high > low:
        low, high = percentile_range(*value_counts(np.stack(slices)))
    return [range_to_eight_bit(cut, low, high) for cut in slices]


def _square_size(shape: tuple[int, int], zooms: tuple[float, float]) -> tuple[int, int]:
    """Rows and columns of a picture once its pixels are square."""
    row, column = zooms
    is_usable = np.isfinite(row) and np.isfinite(column) and row > 0 and column > 0
    if not is_usable or abs(row - column) <= _SQUARE * max(row, column):
        return shape
    finest = min(row, column)
    return max(1, round(shape[0] * row / finest)), max(1, round(shape[1] * column / finest))


def _square(picture: np.ndarray, zooms: tuple[float, float]) -> np.ndarray:
    height, width = _square_size((picture.shape[0], picture.shape[1]), zooms)
    if (height, width) == picture.shape[:2]:
        return picture
    image = Image.fromarray(np.ascontiguousarray(picture))
    return np.asarray(image.resize((width, height), Image.Resampling.BICUBIC))
