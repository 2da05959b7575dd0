"""DICOM files → the stacks of slices among them, each in the order in which its slices lie.

| name | gives |
|---|---|
| `sort_series` | the stacks among any files |
| `read_series` | the one series of a folder, checked |
"""

import functools
import hashlib
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from moellava.images.dicom_error import DicomError
from moellava.images.image_like import DicomDataset
from moellava.images.kinds import HEADER_BYTES, is_dicom
from moellava.images.optional import load_optional
from moellava.images.silence import silent_libraries
from moellava.images.view import PLANES
from moellava.storage.limits import require_within

_SUFFIXES = (".dcm", ".dicom", ".ima")
_ELEMENTS = (
    "SOPClassUID",
    "PatientID",
    "PatientName",
    "SeriesInstanceUID",
    "InstanceNumber",
    "ImagePositionPatient",
    "ImageOrientationPatient",
    "NumberOfFrames",
    "Rows",
    "Columns",
)
# From DICOM's axes (left, posterior, superior) to those of `PLANES` (right, anterior, superior).
_TO_RAS = np.array([-1.0, -1.0, 1.0])
# Files round positions, so that equal distances differ a little.
_SPACING_TOLERANCE = 0.05


@dataclass(frozen=True)
class _Slice:
    """What slices of one stack share, and what orders them; nothing here may be printed."""

    patient: str  # a hash
    series: str
    form: tuple[object, ...]  # rows, columns, orientation
    place: tuple[float, int]  # millimetres along the normal, then Instance Number
    normal: tuple[float, float, float]  # right, anterior, superior

    @property
    def axis(self) -> int:
        """The axis of right, anterior, superior that the slice lies across, or nearly so."""
        return int(np.abs(self.normal).argmax())


@dataclass(frozen=True)
class Series:
    """The slices of one DICOM series.

    Args:
        files: from left to right, back to front or feet to head, as the slices of a NIfTI file are
            counted.
        plane: the one of `PLANES` that is nearest to the slices' own.
        spacing: millimetres between neighbours; None for a single slice.
    """

    files: tuple[Path, ...]
    plane: str
    spacing: float | None


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
            groups[(found.series, found.form)].append((found.place, path))
    return [[path for _, path in sorted(group)] for group in groups.values()]


def read_series(folder: Path) -> Series:
    """The slices of the DICOM series in a folder, sorted by position; only headers are read.

    Files of the folder that are not DICOM are no part of it, nor are DICOM files without a picture,
    such as a DICOMDIR. A series that was read before is read again once its folder has changed.

    Raises:
        ImportError: pydicom is not installed.
        DicomError: no slices, or those of several patients or series; sizes or orientations that
            differ; two slices in one place; missing slices; two spacings. Files are named, patients
            never.
    """
    return _read_series(folder, folder.stat().st_mtime_ns)


@functools.lru_cache(maxsize=64)
def _read_series(folder: Path, changed: int) -> Series:
    paths = sorted(path for path in folder.iterdir() if path.is_file())
    require_within("slices", len(paths), folder)
    found: dict[Path, _Slice] = {}
    unplaced: list[Path] = []
    for path in paths:
        is_named = path.name.lower().endswith(_SUFFIXES)  # some files lack the mark of DICOM
        if not is_named and not _is_dicom_file(path):
            continue
        header = _header(path)
        if header is None or (is_named and "SOPClassUID" not in header):
            raise DicomError(f"{path} cannot be read as DICOM: it is broken. Move it away.")
        if header.get("Rows") is None:
            continue
        one = _slice_of(header)
        if one is None:
            unplaced.append(path)
        else:
            found[path] = one
    if unplaced:
        raise DicomError(
            f"{folder} holds {_counted(unplaced)} that is no slice of a series: no series, no "
            f"position, or several frames in a file. Move {unplaced[0].name} away, or give it "
            "alone."
        )
    if not found:
        raise DicomError(f"{folder} holds no slices of a DICOM series.")
    _require_one(folder, found)
    first = next(iter(found.values()))
    sign = 1 if first.normal[first.axis] > 0 else -1
    files = sorted(found, key=lambda path: sign * found[path].place[0])
    spacing = _even_spacing(folder, files, [sign * found[path].place[0] for path in files])
    plane = next(name for name, axis in PLANES.items() if axis == first.axis)
    return Series(tuple(files), plane, spacing)


def _require_one(folder: Path, found: dict[Path, _Slice]) -> None:
    """Raise an error unless all slices are of one patient, one series and one form."""
    for what, name in (
        ("more than one patient", "patient"),
        ("{count} series", "series"),
        ("{count} sizes or orientations", "form"),
    ):
        groups: defaultdict[object, list[Path]] = defaultdict(list)
        for path, one in found.items():
            groups[getattr(one, name)].append(path)
        if len(groups) > 1:
            shown = ", ".join(_counted(group) for group in list(groups.values())[:4])
            raise DicomError(
                f"{folder} holds slices of {what.format(count=len(groups))}: {shown}. "
                "Put each in a folder of its own."
            )


def _even_spacing(folder: Path, files: Sequence[Path], places: Sequence[float]) -> float | None:
    """The distance of neighbours in millimetres, which is one for all."""
    if len(files) < 2:
        return None
    gaps = np.diff(places)
    usual, closest = float(gaps.min()), int(gaps.argmin())
    if usual <= _SPACING_TOLERANCE * float(np.median(gaps)):
        raise DicomError(
            f"{folder} holds two slices in one place, {files[closest].name} and "
            f"{files[closest + 1].name}: they may be of two times or echoes. Put each set in a "
            "folder of its own."
        )
    steps = gaps / usual
    is_even = steps - 1 <= _SPACING_TOLERANCE
    if is_even.all():
        return float(gaps.mean())
    at = int(np.flatnonzero(~is_even)[0])
    between = f"between {files[at].name} and {files[at + 1].name}"
    if (np.abs(steps - steps.round()) <= _SPACING_TOLERANCE * steps).all():
        missing = int((steps.round() - 1).sum())
        raise DicomError(
            f"{folder} lacks {missing} of {len(files) + missing} slices, the first {between}, "
            f"which are {gaps[at]:.2f} mm apart; others are {usual:.2f} mm apart. Add them, or "
            "give single slices as images."
        )
    raise DicomError(
        f"{folder} holds slices with two spacings: {usual:.2f} mm, and {gaps[at]:.2f} mm "
        f"{between}. Put each set in a folder of its own."
    )


def _counted(paths: Sequence[Path]) -> str:
    rest = f" and {len(paths) - 1} more" if len(paths) > 1 else ""
    return f"{paths[0].name}{rest}"


def _slice(path: Path) -> _Slice | None:
    """None if the file is not DICOM, broken, of several frames, or without a position."""
    if not _is_dicom_file(path):
        return None
    header = _header(path)
    return None if header is None else _slice_of(header)


def _is_dicom_file(path: Path) -> bool:
    with path.open("rb") as file:
        return is_dicom(file.read(HEADER_BYTES))


def _header(path: Path) -> DicomDataset | None:
    """The elements of `_ELEMENTS`; None of a broken file, which the decoder names."""
    pydicom = load_optional("pydicom", f"{path} is a DICOM file", extra="dicom")
    try:
        with silent_libraries():
            header: DicomDataset = pydicom.dcmread(
                path, stop_before_pixels=True, specific_tags=list(_ELEMENTS), force=True
            )
            return header
    except Exception:  # whatever a broken file leads pydicom to
        return None


def _slice_of(header: DicomDataset) -> _Slice | None:
    try:
        series = header.get("SeriesInstanceUID")
        position = np.asarray(header.get("ImagePositionPatient") or [], dtype=np.float64)
        axes = np.asarray(header.get("ImageOrientationPatient") or [], dtype=np.float64)
        num_frames = int(header.get("NumberOfFrames") or 1)
        number = int(header.get("InstanceNumber") or 0)
    except Exception:  # a value that is no number
        return None
    if not series or position.shape != (3,) or axes.shape != (6,) or num_frames != 1:
        return None
    patient = str(header.get("PatientID") or header.get("PatientName") or "")
    normal = np.cross(axes[:3], axes[3:])
    along = float(position @ normal)
    if not np.isfinite(along):
        return None
    right, anterior, superior = (float(part) for part in normal * _TO_RAS)
    return _Slice(
        patient=hashlib.sha256(patient.encode(errors="replace")).hexdigest(),
        series=str(series),
        form=(header.get("Rows"), header.get("Columns"), *axes.round(3).tolist()),
        place=(along, number),
        normal=(right, anterior, superior),
    )
