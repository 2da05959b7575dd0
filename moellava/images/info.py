"""An image file → what can be chosen about it before it is shown: `describe_image`, `ImageInfo`."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from PIL import Image

from moellava.images.dicom_error import reason_without_values
from moellava.images.dicom_file import GREY, read_dicom
from moellava.images.dicom_grey import grey_range, grey_tags, shown_in
from moellava.images.kinds import HEADER_BYTES, kind_of_file
from moellava.images.optional import load_optional
from moellava.images.picture import decode_picture
from moellava.images.silence import silent_libraries
from moellava.images.view import MAX_PIXELS, PLANES, View


@dataclass(frozen=True, kw_only=True)
class ImageInfo:
    """What a viewer needs to offer a choice of frames and windows.

    Args:
        num_frames: frames or slices, by plane for a volume ("axial", "coronal", "sagittal");
            under "" for everything else.
        grey_range: smallest and largest value of the middle frame, in the file's unit (Hounsfield
            units for CT); None if a window means nothing, as for colour.
        window: (center, width) that the file is shown in unless told otherwise; None if it does not
            say.
        is_ct: whether the presets of `moellava.images.WINDOWS` apply.
    """

    num_frames: Mapping[str, int] = field(default_factory=lambda: {"": 1})
    grey_range: tuple[float, float] | None = None
    window: tuple[float, float] | None = None
    is_ct: bool = False

    @property
    def planes(self) -> tuple[str, ...]:
        """Of a volume; empty for everything else."""
        return tuple(plane for plane in self.num_frames if plane)


def describe_image(path: Path, *, max_pixels: int = MAX_PIXELS) -> ImageInfo:
    """The frames, planes and greys that can be chosen from in a file.

    Raises:
        ImportError: pydicom or nibabel is needed, and not installed.
        ValueError: a broken file, or one with a larger picture than `max_pixels`; it is named.
    """
    view, name = View(max_pixels=max_pixels), str(path)
    with path.open("rb") as file:
        kind = kind_of_file(path, file.read(HEADER_BYTES))
    describe = _DESCRIBE.get("" if kind is None else kind.name, _describe_picture)
    try:
        with silent_libraries():
            return describe(path, view)
    except (ImportError, MemoryError):
        raise
    # The libraries raise whatever a broken file leads them to, with what it holds in the text.
    except Exception as error:
        if isinstance(error, ValueError) and str(error).startswith(name):
            raise
        reason = reason_without_values(error)
        raise ValueError(f"{name} cannot be read as an image: it is broken ({reason}).") from None


def _describe_dicom(path: Path, view: View) -> ImageInfo:
    file = read_dicom(path, str(path))
    header, num_frames = file.header, {"": file.num_frames}
    view.check_size(int(header.Columns), int(header.Rows), str(path))
    if header.get("PhotometricInterpretation") not in GREY:
        return ImageInfo(num_frames=num_frames)
    middle = file.num_frames // 2
    tags = grey_tags(header, middle)
    shown = shown_in(tags, view, str(path))
    return ImageInfo(
        num_frames=num_frames,
        grey_range=grey_range(file.values(middle), tags),
        window=shown.windows[0] if shown.windows and not shown.voi_luts else None,
        is_ct=tags.is_ct,
    )


def _describe_nifti(path: Path, view: View) -> ImageInfo:
    nibabel = load_optional("nibabel", f"{path} is a NIfTI file", extra="nifti")
    image = nibabel.load(path)
    orientation = nibabel.io_orientation(image.affine)
    natives = {int(axis): place for place, axis in enumerate(orientation[:, 0])}
    sizes = {plane: int(image.shape[natives[axis]]) for plane, axis in PLANES.items()}
    view.check_size(sizes["sagittal"], sizes["coronal"], str(path))
    num_frames = {plane: sizes[plane] for plane in ("axial", "coronal", "sagittal")}
    native = natives[PLANES["axial"]]
    middle = sizes["axial"] // 2
    if orientation[native, 1] < 0:  # the file runs from head to feet
        middle = sizes["axial"] - 1 - middle
    cut: list[slice] = [slice(None)] * 3
    cut[native] = slice(middle, middle + 1)
    values = np.asanyarray(image.dataobj[(*cut, *(0 for _ in image.shape[3:]))])
    if values.dtype.kind not in "uif":
        return ImageInfo(num_frames=num_frames)
    values = values[np.isfinite(values)]
    low, high = (float(image.header.get(key, 0)) for key in ("cal_min", "cal_max"))
    return ImageInfo(
        num_frames=num_frames,
        grey_range=(float(values.min()), float(values.max())) if values.size else None,
        window=((low + high) / 2, high - low) if high - low >= 1 else None,
    )


def _describe_picture(path: Path, view: View) -> ImageInfo:
    try:
        with Image.open(path) as image:
            view.check_size(*image.size, str(path))
            return ImageInfo(num_frames={"": int(getattr(image, "n_frames", 1))})
    except (Image.DecompressionBombError, OSError):
        decode_picture(path, view, str(path))  # says what is wrong
        raise


_DESCRIBE: dict[str, Callable[[Path, View], ImageInfo]] = {
    "DICOM": _describe_dicom,
    "NIfTI": _describe_nifti,
    "gzipped NIfTI": _describe_nifti,
}
