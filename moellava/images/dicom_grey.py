"""Stored grey values of a DICOM frame → 8 bits, as the elements of its header say.

`grey_tags` reads those elements, `shown_in` puts the window asked for in the place of the file's
own, `grey_picture` computes what is shown.
"""

import functools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from PIL import Image

from moellava.images.dicom_error import DicomError, modality_name
from moellava.images.eight_bit import by_rows
from moellava.images.image_like import DicomDataset
from moellava.images.optional import load_optional
from moellava.images.view import View, percentile_range, say_once, value_counts

# What decides how grey values are shown, besides the photometric interpretation.
GREY_ELEMENTS = (
    "BitsStored",
    "PixelRepresentation",
    "PresentationLUTShape",
    "Modality",
    "PixelPaddingValue",
    "RescaleSlope",
    "RescaleIntercept",
    "RescaleType",
    "ModalityLUTSequence",
    "WindowCenter",
    "WindowWidth",
    "VOILUTFunction",
    "VOILUTSequence",
)
_BLOCK = 1 << 15  # pixels looked up at a time


@dataclass(frozen=True)
class LookupTable:
    """One item of a modality or VOI LUT sequence (PS3.3 C.11.1.1, C.11.2.1.1).

    Args:
        descriptor: number of entries, first value mapped, bits of an entry.
        data: the entries, or their bytes.
        is_little_endian: the order of the bytes.
    """

    descriptor: tuple[int, int, int]
    data: bytes | Sequence[int]
    is_little_endian: bool

    @property
    def largest(self) -> float:
        """The largest value that an entry can have."""
        return 2.0 ** self.descriptor[2] - 1

    def look_up(self, values: np.ndarray) -> np.ndarray:
        """float64 entries; values beyond the table's ends get its end entries."""
        # pydicom's own function wraps values around if a table of 8-bit entries has more than 256.
        count, first, _ = self.descriptor
        count = count or 2**16
        data = self.data
        if isinstance(data, bytes):
            order = "<" if self.is_little_endian else ">"
            kind = np.uint8 if len(data) <= count + 1 else np.dtype(f"{order}u2")
            data = np.frombuffer(data, dtype=kind)  # type: ignore[assignment]
        entries = np.asarray(data, dtype=np.float64)[:count]
        places = np.clip(np.rint(values) - first, 0, len(entries) - 1).astype(np.int64)
        return np.asarray(entries[places])


@dataclass(frozen=True, kw_only=True)
class GreyTags:
    """What decides how the grey values of one frame are shown.

    Args:
        modality: such as "CT"; empty if the file names none.
        is_ct: whether values are Hounsfield units.
        is_inverted: whether small values are shown bright.
        padding: the stored value of pixels that show nothing.
        rescale: slope and intercept.
        windows: (center, width) of each of the file's windows.
        function: how a window maps values: LINEAR, LINEAR_EXACT or SIGMOID.
        shown_range: of an image without a window, in the unit of its values; None is all that the
            stored bits can hold.
    """

    bits_stored: int
    is_signed: bool
    modality: str
    is_ct: bool
    is_inverted: bool
    padding: int | None
    rescale: tuple[float, float] | None
    modality_lut: LookupTable | None
    windows: tuple[tuple[float, float], ...]
    function: str
    voi_luts: tuple[LookupTable, ...]
    shown_range: tuple[float, float] | None = None

    @property
    def has_window(self) -> bool:
        return bool(self.voi_luts or self.windows)

    def without_window(self) -> "GreyTags":
        return replace(self, windows=(), voi_luts=(), function="LINEAR")


def grey_tags(header: DicomDataset, frame: int) -> GreyTags:
    """The elements of one frame; enhanced multi-frame files keep them in functional groups."""
    found = _elements(header, frame)
    is_little = bool(header.file_meta.TransferSyntaxUID.is_little_endian)
    slope, intercept = found.get("RescaleSlope"), found.get("RescaleIntercept")
    centers, widths = (_as_list(found.get(name)) for name in ("WindowCenter", "WindowWidth"))
    modality_luts, voi_luts = (
        tuple(_lookup_tables(_as_list(found.get(name)), is_little))
        for name in ("ModalityLUTSequence", "VOILUTSequence")
    )
    shape, padding = found.get("PresentationLUTShape"), found.get("PixelPaddingValue")
    modality = str(found.get("Modality", ""))
    return GreyTags(
        bits_stored=int(found.get("BitsStored", 16)),
        is_signed=bool(found.get("PixelRepresentation")),
        modality=modality,
        is_ct=modality == "CT" or found.get("RescaleType") == "HU",
        is_inverted=(
            shape == "INVERSE" if shape else header.PhotometricInterpretation == "MONOCHROME1"
        ),
        padding=None if padding is None else int(padding),
        rescale=None if slope is None or intercept is None else (float(slope), float(intercept)),
        modality_lut=modality_luts[0] if modality_luts else None,
        windows=tuple(
            (float(center), float(width)) for center, width in zip(centers, widths, strict=False)
        ),
        function=str(found.get("VOILUTFunction", "LINEAR")).upper(),
        voi_luts=voi_luts,
    )


def shown_in(tags: GreyTags, view: View, name: str) -> GreyTags:
    """The tags with the window asked for in the place of the file's own.

    Raises:
        ValueError: a CT preset for another modality, or no such window in the file.
    """
    if view.window == "full":
        return tags.without_window()
    if isinstance(view.window, int):
        return _own_window(tags, view.window, name)
    if isinstance(view.window, str) and not tags.is_ct:
        raise DicomError(
            f"{name}: the window {view.window!r} is in Hounsfield units, and this is "
            f"{modality_name(tags.modality)}, not CT. Give (center, width), or leave window out."
        )
    limits = view.limits()
    if limits is None and not tags.has_window and tags.is_ct and tags.rescale is not None:
        say_once(
            "A CT image without a window of its own is shown in the soft-tissue window; "
            "choose with window=."
        )
        limits = View(window="soft").limits()
    return tags if limits is None else replace(tags.without_window(), windows=(limits,))


def grey_picture(stored: np.ndarray, tags: GreyTags, name: str, *, full: bool) -> np.ndarray:
    """(H, W) uint8 of the stored values (H, W).

    Args:
        full: whether the range of the stored bits is shown, for an image without a window.
    """
    _refuse_broken_window(tags, name)
    is_integer = stored.dtype.kind in "ui"
    is_narrow = is_integer and tags.bits_stored <= 8
    if not tags.has_window and not full and not is_narrow:
        tags = _with_percentiles(_used_bits(stored, tags), tags)
    if not is_integer or stored.dtype.itemsize > 2:
        return by_rows(lambda rows: _eight_bits(rows, tags), stored)
    # What is shown depends on the stored value alone: it is computed once for each that occurs.
    stored = stored.astype(stored.dtype.newbyteorder("="), copy=False)
    low, high = int(stored.min()), int(stored.max())
    if high - low >= stored.size:
        return _eight_bits(_used_bits(stored, tags), tags)
    table = lookup_table(low, high, stored.dtype, tags)
    patterns = stored.view(f"u{stored.dtype.itemsize}")
    is_identity = 0 <= low <= high <= 255 and np.array_equal(
        table[low : high + 1], np.arange(low, high + 1)
    )
    return patterns.astype(np.uint8, copy=False) if is_identity else _look_up(patterns, table)


def grey_range(stored: np.ndarray, tags: GreyTags) -> tuple[float, float]:
    """The smallest and the largest value of a frame, in the modality's unit; padding left out."""
    used = stored if tags.padding is None else stored[stored != tags.padding]
    values = _modality_values(_used_bits(used if used.size else stored, tags), tags)
    return float(values.min()), float(values.max())


def lookup_table(low: int, high: int, dtype: np.dtype, tags: GreyTags) -> np.ndarray:
    """What each stored value from `low` to `high` is shown as.

    Returns:
        (256,) or (65536,) uint8, indexed by the bits of the value read as an unsigned number.
    """
    values = np.arange(low, high + 1).astype(dtype)
    table = np.zeros(2 ** (8 * dtype.itemsize), np.uint8)
    table[values.view(f"u{dtype.itemsize}")] = _eight_bits(_used_bits(values, tags), tags)
    return table


def _look_up(patterns: np.ndarray, table: np.ndarray) -> np.ndarray:
    if len(table) == 256:
        return np.asarray(Image.fromarray(patterns).point(table.tolist()))
    shown = np.empty(patterns.shape, np.uint8)
    step = max(1, _BLOCK // patterns.shape[1])
    for top in range(0, len(patterns), step):
        # By blocks that stay in the cache: numpy widens the places to 64 bits. "clip" spares a
        # check that cannot fail.
        np.take(table, patterns[top : top + step], out=shown[top : top + step], mode="clip")
    return shown


def _used_bits(stored: np.ndarray, tags: GreyTags) -> np.ndarray:
    """Of 16 allocated bits those that are stored, with the sign of the highest (PS3.5, 8.1.1)."""
    unused = 16 - tags.bits_stored
    if stored.dtype.kind not in "ui" or stored.dtype.itemsize != 2 or unused <= 0:
        return stored
    return np.asarray((stored << unused) >> unused)


def _with_percentiles(stored: np.ndarray, tags: GreyTags) -> GreyTags:
    """The tags with the percentiles of the values as the range shown, padding left out."""
    say_once(
        "A DICOM image of more than 8 bits without a window is shown between the 0.5th and 99.5th "
        "percentile of its own values; give window=(center, width), or window='full', for the same "
        "greys in all images."
    )
    stored, counts = value_counts(stored)
    if tags.padding is not None:
        is_used = stored != tags.padding
        stored, counts = stored[is_used], None if counts is None else counts[is_used]
    return replace(tags, shown_range=percentile_range(_modality_values(stored, tags), counts))


def _eight_bits(stored: np.ndarray, tags: GreyTags) -> np.ndarray:
    values = _modality_values(stored, tags)
    if tags.voi_luts:
        share = tags.voi_luts[0].look_up(values) / tags.voi_luts[0].largest
    elif tags.windows:
        share = _windowed(values, *tags.windows[0], tags.function)
    else:
        low, high = tags.shown_range or _modality_range(tags)
        share = (values - low) / ((high - low) or np.inf)
    share = np.clip(1 - share if tags.is_inverted else share, 0, 1)
    return np.rint(np.nan_to_num(share) * 255).astype(np.uint8)


def _modality_values(stored: np.ndarray, tags: GreyTags) -> np.ndarray:
    """float64 values in the modality's unit, such as Hounsfield's."""
    if tags.modality_lut is not None:
        return tags.modality_lut.look_up(stored)
    slope, intercept = tags.rescale or (1.0, 0.0)
    return np.asarray(stored.astype(np.float64) * slope + intercept)


def _modality_range(tags: GreyTags) -> tuple[float, float]:
    """The smallest and the largest value that the stored bits can stand for."""
    if tags.modality_lut is not None:
        return 0.0, tags.modality_lut.largest
    half = 2 ** (tags.bits_stored - 1)
    ends = (-half, half - 1) if tags.is_signed else (0, 2 * half - 1)
    slope, intercept = tags.rescale or (1.0, 0.0)
    low, high = sorted(end * slope + intercept for end in ends)
    return low, high


def _windowed(values: np.ndarray, center: float, width: float, function: str) -> np.ndarray:
    """The share of the output range for each value: below 0 before the window, above 1 behind it.

    PS3.3 C.11.2.1.2 and C.11.2.1.3; pydicom's function writes the same into a range of the
    dataset's.
    """
    if function == "SIGMOID":
        return np.asarray(1 / (1 + np.exp(-4 * (values - center) / width)))
    if function == "LINEAR":
        center, width = center - 0.5, width - 1
    if width == 0:
        return np.where(values > center, 1.0, 0.0)
    return (values - center) / width + 0.5


def _refuse_broken_window(tags: GreyTags, name: str) -> None:
    if tags.voi_luts or not tags.windows:
        return
    hint = "Give window=(center, width)."
    if tags.function not in ("LINEAR", "LINEAR_EXACT", "SIGMOID"):
        raise DicomError(
            f"{name} has an unknown VOI LUT Function; expected LINEAR, LINEAR_EXACT or SIGMOID. "
            f"{hint}"
        )
    center, width = tags.windows[0]
    least = 1 if tags.function == "LINEAR" else 0
    if not (np.isfinite(center) and np.isfinite(width) and width >= least and width > 0):
        expected = "at least 1" if least else "more than 0"
        raise DicomError(f"{name} has a Window Width that is not {expected}. {hint}")


def _own_window(tags: GreyTags, index: int, name: str) -> GreyTags:
    count = len(tags.voi_luts) or len(tags.windows)
    if not 0 <= index < count:
        raise DicomError(f"{name} has no window {index}: it has {count} of its own.")
    if tags.voi_luts:
        return replace(tags, voi_luts=(tags.voi_luts[index],))
    return replace(tags, windows=(tags.windows[index],))


def _elements(header: DicomDataset, frame: int) -> dict[str, Any]:
    """Values of `GREY_ELEMENTS` by keyword, without empty ones."""
    groups = [header]
    for sequence, number in (
        ("SharedFunctionalGroupsSequence", 0),
        ("PerFrameFunctionalGroupsSequence", frame),
    ):
        items = header.get(sequence) or []
        if number < len(items):
            for macro in ("PixelValueTransformationSequence", "FrameVOILUTSequence"):
                groups += items[number].get(macro) or []
    found: dict[str, Any] = {}
    for group in groups:
        found |= {
            keyword: group[tag].value for keyword, tag in _grey_numbers().items() if tag in group
        }
    return {keyword: value for keyword, value in found.items() if value not in (None, "")}


@functools.cache
def _grey_numbers() -> dict[str, int]:
    pydicom = load_optional("pydicom", "This is a DICOM file", extra="dicom")
    return {keyword: pydicom.tag.Tag(keyword) for keyword in GREY_ELEMENTS}


def _lookup_tables(items: list[Any], is_little_endian: bool) -> Iterator[LookupTable]:
    """The tables of a sequence; an item without descriptor or data counts as absent."""
    for item in items:
        descriptor, data = item.get("LUTDescriptor"), item.get("LUTData")
        if descriptor in (None, "") or data in (None, "", b"") or len(data) == 0:
            continue
        count, first, bits = (int(number) for number in descriptor)
        yield LookupTable((count, first, bits), data, is_little_endian)


def _as_list(value: Any) -> list[Any]:
    if value is None:
        return []
    is_several = isinstance(value, Sequence) and not isinstance(value, str)
    return list(value) if is_several else [value]
