"""Files in any order → the DICOM series among them, each in the order of its slices."""

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from moellava.images.image_like import DicomDataset
from moellava.images.kinds import HEADER_BYTES, is_dicom
from moellava.images.optional import load_optional
from moellava.images.silence import silent_libraries

_ELEMENTS = (
    "SeriesInstanceUID",
    "InstanceNumber",
    "ImagePositionPatient",
    "ImageOrientationPatient",
    "NumberOfFrames",
    "Rows",
    "Columns",
)


@dataclass(frozen=True)
class _Slice:
    """What slices of one stack share, and what orders them."""

    stack: tuple[object, ...]
    place: tuple[float, int]  # millimetres along the normal, then Instance Number


def sort_series(paths: Sequence[Path]) -> list[list[Path]]:
    """Groups of files, in the order of their first ones; what is not a slice stands alone.

    Slices of one series, size and orientation are one group, sorted along their normal (PS3.3
    C.7.6.2.1.1). Files without a position, such as radiographs, stand alone.

    Raises:
        ImportError: there are DICOM files and pydicom is not installed.
    """
    groups: defaultdict[object, list[tuple[tuple[float, int], Path]]] = defaultdict(list)
    for path in paths:
        found = _slice(path)
        if found is None:
            groups[path].append(((0.0, 0), path))
        else:
            groups[found.stack].append((found.place, path))
    return [[path for _, path in sorted(group)] for group in groups.values()]


def _slice(path: Path) -> _Slice | None:
    """None if the file is not DICOM, broken, of several frames, or without a position."""
    with path.open("rb") as file:
        if not is_dicom(file.read(HEADER_BYTES)):
            return None
    pydicom = load_optional("pydicom", f"{path} is a DICOM file", extra="dicom")
    try:
        with silent_libraries():
            return _slice_of(
                pydicom.dcmread(path, stop_before_pixels=True, specific_tags=list(_ELEMENTS))
            )
    except Exception:  # whatever a broken file leads pydicom to; the decoder says what it is
        return None


def _slice_of(header: DicomDataset) -> _Slice | None:
    series = header.get("SeriesInstanceUID")
    position = np.asarray(header.get("ImagePositionPatient") or [], dtype=np.float64)
    axes = np.asarray(header.get("ImageOrientationPatient") or [], dtype=np.float64)
    is_placed = position.shape == (3,) and axes.shape == (6,)
    if not series or not is_placed or int(header.get("NumberOfFrames") or 1) != 1:
        return None
    along = float(position @ np.cross(axes[:3], axes[3:]))
    if not np.isfinite(along):
        return None
    stack = (str(series), header.get("Rows"), header.get("Columns"), *axes.round(3).tolist())
    return _Slice(stack, (along, int(header.get("InstanceNumber") or 0)))
