"""A DICOM file → the picture that a viewer would show, in 8 bits, through pydicom's decoders.

The chain is the standard's (PS3.3 C.11, PS3.4 N.2): stored values, modality LUT or rescale, VOI LUT or window,
presentation (MONOCHROME1 is inverted), then the output range, known from the header, as 0 to 255.
Only the elements named here are kept when a file is read: those of the patient and the study are never looked at.
"""

import functools
import io
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from moellava.images.optional import load_optional
from moellava.images.view import View, montage, percentile_to_eight_bit, range_to_eight_bit, say_once

Dataset = Any  # pydicom's, which is imported when the first DICOM file is read

# What is kept of a file besides its pixels. Fewer names also mean less time: pydicom converts each of them per file.
_KEPT = (
    *("SOPClassUID", "Modality", "PresentationLUTShape", "NumberOfFrames", "ExtendedOffsetTable"),
    *("SharedFunctionalGroupsSequence", "PerFrameFunctionalGroupsSequence", "ExtendedOffsetTableLengths"),
    *("Rows", "Columns", "SamplesPerPixel", "PhotometricInterpretation", "PlanarConfiguration", "PixelPresentation"),
    *("BitsAllocated", "BitsStored", "HighBit", "PixelRepresentation", "PixelPaddingValue"),
    *("RescaleSlope", "RescaleIntercept", "RescaleType", "ModalityLUTSequence"),
    *("WindowCenter", "WindowWidth", "VOILUTFunction", "VOILUTSequence"),
    *(f"{colour}PaletteColorLookupTableDescriptor" for colour in ("Red", "Green", "Blue")),
    *(f"{colour}PaletteColorLookupTableData" for colour in ("Red", "Green", "Blue")),
    *(f"Segmented{colour}PaletteColorLookupTableData" for colour in ("Red", "Green", "Blue")),
)
# Of these, what decides how grey values are shown.
_GREY_NAMES = (
    *("BitsStored", "PixelRepresentation", "PresentationLUTShape", "Modality", "PixelPaddingValue"),
    *("RescaleSlope", "RescaleIntercept", "RescaleType", "ModalityLUTSequence"),
    *("WindowCenter", "WindowWidth", "VOILUTFunction", "VOILUTSequence"),
)
_PIXELS = (0x7FE00008, 0x7FE00009, 0x7FE00010)
_READ_WHOLE = 1 << 24  # bytes; larger files are read frame by frame
_GREY = ("MONOCHROME1", "MONOCHROME2")
_COLOUR = ("RGB", "YBR_FULL", "YBR_FULL_422", "YBR_ICT", "YBR_RCT")
_VALUES_OF_A_TABLE = 1 << 16
_BLOCK = 1 << 14  # pixels looked up at a time

# By the end of the transfer syntax's UID: which package decodes it, beyond Pillow.
_DECODERS = {
    "1.2.840.10008.1.2.4.51": "pylibjpeg pylibjpeg-libjpeg  (GPLv3)",
    "1.2.840.10008.1.2.4.57": "python-gdcm",
    "1.2.840.10008.1.2.4.70": "python-gdcm",
    "1.2.840.10008.1.2.4.80": "pyjpegls",
    "1.2.840.10008.1.2.4.81": "pyjpegls",
    "1.2.840.10008.1.2.4.90": "pylibjpeg pylibjpeg-openjpeg",
    "1.2.840.10008.1.2.4.91": "pylibjpeg pylibjpeg-openjpeg",
    "1.2.840.10008.1.2.4.201": "pylibjpeg pylibjpeg-openjpeg",
    "1.2.840.10008.1.2.4.202": "pylibjpeg pylibjpeg-openjpeg",
    "1.2.840.10008.1.2.4.203": "pylibjpeg pylibjpeg-openjpeg",
}


def decode_dicom(source: str | Path | bytes | Dataset, view: View, name: str) -> np.ndarray:
    """(H, W) or (H, W, 3) uint8 of a file, its bytes, or a dataset.

    Raises:
        ImportError: pydicom is not installed.
        DicomError: no picture in it, broken, no such frame or window, or no decoder for its compression.
    """
    _pydicom(name)
    try:
        header = _read(source)
        _refuse_what_is_no_picture(header, name)
        view.check_size(int(header.Columns), int(header.Rows), name)
        count = int(header.get("NumberOfFrames", None) or 1)
        pictures = []
        for frame in view.frames(count, name):
            stored = _stored_values(source, header, frame, name)
            pictures.append(_shown(stored, header, frame, view, name))
        view.check_size(pictures[0].shape[1] * len(pictures), pictures[0].shape[0], name)
        return montage(pictures)
    except (DicomError, MemoryError):
        raise
    except ValueError as error:
        raise DicomError(str(error) if str(error).startswith(name) else f"{name}: {_one_line(error)}") from error
    except Exception as error:  # pydicom's parser and the decoders raise whatever a broken file leads them to
        raise DicomError(f"{name} cannot be read as DICOM: {_one_line(error)}") from error


class DicomError(ValueError):
    """Why a DICOM file gives no picture; the file is named, what it says of a patient never."""


def _read(source: Any) -> Dataset:
    """The elements of the picture; with its pixels, unless the file is a large one."""
    pydicom = _pydicom()
    uid = pydicom.uid
    if isinstance(source, pydicom.Dataset):
        header = source
    else:
        is_large = not isinstance(source, bytes) and Path(source).stat().st_size > _READ_WHOLE
        file: Any = io.BytesIO(source) if isinstance(source, bytes) else source
        tags = [*_kept_tags(), *(() if is_large else _PIXELS)]
        header = pydicom.dcmread(file, stop_before_pixels=is_large, specific_tags=tags, force=True)
    meta = getattr(header, "file_meta", None)
    if meta is None or "TransferSyntaxUID" not in meta:  # no header of the file format: pydicom has guessed by content
        header.file_meta = meta = meta if meta is not None else pydicom.dataset.FileMetaDataset()
        is_implicit, is_little = header.original_encoding
        explicit = uid.ExplicitVRLittleEndian if is_little else uid.ExplicitVRBigEndian
        meta.TransferSyntaxUID = uid.ImplicitVRLittleEndian if is_implicit else explicit
    return header


def _pydicom(name: str = "This") -> Any:
    return load_optional("pydicom", f"{name} is a DICOM file", extra="dicom")


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__


@functools.cache
def _kept_tags() -> tuple[int, ...]:
    tag_for_keyword = _pydicom().datadict.tag_for_keyword
    return tuple(tag_for_keyword(keyword) for keyword in _KEPT)


def _refuse_what_is_no_picture(header: Dataset, name: str) -> None:
    kind = _pydicom().uid.UID(str(header.get("SOPClassUID", "") or header.file_meta.get("MediaStorageSOPClassUID", "")))
    if kind.name == "Media Storage Directory Storage":
        raise DicomError(f"{name} is a DICOMDIR, the index of a disc. Give one of the image files that it lists.")
    if "Rows" not in header or "Columns" not in header:
        what = f" of the class {kind.name!r}" if kind else ""
        raise DicomError(f"{name} is a DICOM file{what} without a picture: it has no rows and columns.")
    frames = header.get_item("NumberOfFrames")
    if frames is not None and not str(header.get("NumberOfFrames", "") or "1").isdigit():
        raise DicomError(f"{name} has a broken Number of Frames, {header.NumberOfFrames!r}.")


def _stored_values(source: Any, header: Dataset, frame: int, name: str) -> np.ndarray:
    """(H, W) or (H, W, 3), colours converted to RGB, of one frame; other frames are not decoded."""
    pydicom = _pydicom()
    pixel_array = pydicom.pixels.pixel_array
    syntax = header.file_meta.TransferSyntaxUID
    has_pixels = any(tag in header for tag in _PIXELS)
    try:
        if has_pixels:
            return pixel_array(header, index=frame, view_only=True)  # not copied; nothing here writes into it
        if isinstance(source, (str, Path)) and syntax != pydicom.uid.DeflatedExplicitVRLittleEndian:
            return pixel_array(source, index=frame, transfer_syntax_uid=syntax)
        return pixel_array(pydicom.dcmread(source, specific_tags=[*_kept_tags(), *_PIXELS]), index=frame)
    except (RuntimeError, NotImplementedError) as error:
        package = _DECODERS.get(str(syntax))
        hint = f" Type: pip install {package}" if package else ""
        raise DicomError(
            f"{name}: no installed decoder reads its pixels ({syntax.name}).{hint} ({_one_line(error)})"
        ) from error
    except AttributeError as error:
        if "pixel data" in str(error).lower():
            raise DicomError(f"{name} is a DICOM file without pixel data.") from error
        raise


def _shown(stored: np.ndarray, header: Dataset, frame: int, view: View, name: str) -> np.ndarray:
    kind = str(header.PhotometricInterpretation)
    if kind in _GREY:
        tags = _grey_tags(header, frame)
        _choose_window(tags, view, name)
        return _grey_picture(stored, tags, full=view.window == "full")
    if view.limits() is not None or isinstance(view.window, int):
        raise DicomError(f"{name} is in colour ({kind}); a window is for grey images. Leave window out.")
    if kind == "PALETTE COLOR":
        colours = _pydicom().pixels.apply_color_lut(stored, header)[..., :3]
        # Entries of 8 bits may be stored in the upper half of 16.
        return colours if colours.dtype == np.uint8 else (colours >> 8).astype(np.uint8)
    if kind not in _COLOUR or stored.ndim != 3:
        raise DicomError(f"{name} has the photometric interpretation {kind!r}; expected {', '.join(_GREY + _COLOUR)}.")
    bits = int(header.BitsStored)
    return stored if stored.dtype == np.uint8 and bits == 8 else range_to_eight_bit(stored, 0, 2**bits - 1)


# -- grey values


def _grey_tags(header: Dataset, frame: int) -> Dataset:
    """The elements that decide how grey values are shown, in one flat dataset.

    Enhanced multi-frame files keep them in functional groups, which pydicom's functions do not look into.
    """
    tags = _pydicom().Dataset()
    groups = [header]
    for sequence, item in (("SharedFunctionalGroupsSequence", 0), ("PerFrameFunctionalGroupsSequence", frame)):
        items = header.get(sequence) or []
        if item < len(items):
            for macro in ("PixelValueTransformationSequence", "FrameVOILUTSequence"):
                groups += items[item].get(macro) or []
    for group in groups:
        for keyword in _GREY_NAMES:
            if keyword in group and group[keyword].value not in (None, ""):
                tags[keyword] = group[keyword]
    tags.file_meta = header.file_meta
    tags.PhotometricInterpretation = str(header.PhotometricInterpretation)
    return tags


def _choose_window(tags: Dataset, view: View, name: str) -> None:
    """Put the window asked for in the place of the file's own."""
    if view.window == "full":
        _forget_window(tags)
        return
    limits = view.limits()
    if isinstance(view.window, str) and not _is_ct(tags):
        raise DicomError(
            f"{name}: the window {view.window!r} is in Hounsfield units, and this is "
            f"{tags.get('Modality') or 'no modality'}, not CT. Give (center, width), or leave window out."
        )
    if isinstance(view.window, int):
        _choose_own(tags, view.window, name)
    elif limits is None and not _has_window(tags) and _is_ct(tags) and "RescaleIntercept" in tags:
        say_once("A CT image without a window of its own is shown in the soft-tissue window; choose with window=.")
        limits = View(window="soft").limits()
    if limits is not None:
        _forget_window(tags)
        tags.WindowCenter, tags.WindowWidth = limits


def _choose_own(tags: Dataset, index: int, name: str) -> None:
    luts = list(tags.get("VOILUTSequence") or [])
    centers, widths = (_as_list(tags.get(keyword)) for keyword in ("WindowCenter", "WindowWidth"))
    count = len(luts) or min(len(centers), len(widths))
    if not 0 <= index < count:
        raise DicomError(f"{name} has no window {index}: it has {count} of its own.")
    if luts:
        tags.VOILUTSequence = [luts[index]]
    else:
        tags.WindowCenter, tags.WindowWidth = centers[index], widths[index]


def _forget_window(tags: Dataset) -> None:
    for keyword in ("WindowCenter", "WindowWidth", "VOILUTFunction", "VOILUTSequence"):
        if keyword in tags:
            del tags[keyword]


def _has_window(tags: Dataset) -> bool:
    return bool(tags.get("VOILUTSequence")) or ("WindowCenter" in tags and "WindowWidth" in tags)


def _is_ct(tags: Dataset) -> bool:
    return tags.get("Modality") == "CT" or tags.get("RescaleType") == "HU"


def _grey_picture(stored: np.ndarray, tags: Dataset, *, full: bool) -> np.ndarray:
    """What is shown is a function of the stored value alone: in large images it is computed once for each value."""
    is_integer = stored.dtype.kind in "ui"
    narrow = is_integer and int(tags.get("BitsStored", 16)) <= 8
    if not _has_window(tags) and not full and not narrow:
        return _without_window(stored, tags)
    if not is_integer or stored.dtype.itemsize > 2 or stored.size < _VALUES_OF_A_TABLE:
        return _eight_bits(stored, tags)
    stored = stored.astype(stored.dtype.newbyteorder("="), copy=False)
    table = _table(_Key(_key_of(tags), stored.dtype.str, tags))
    places, shown = stored.view(f"u{stored.dtype.itemsize}"), np.empty(stored.shape, np.uint8)
    step = max(1, _BLOCK // stored.shape[1])
    for top in range(0, len(places), step):
        # By blocks that stay in the cache: numpy widens the places to 64 bits. "clip" spares a check that cannot fail.
        np.take(table, places[top : top + step], out=shown[top : top + step], mode="clip")
    return shown


def _without_window(stored: np.ndarray, tags: Dataset) -> np.ndarray:
    say_once(
        "A DICOM image of more than 8 bits without a window is shown between the 0.5th and 99.5th percentile of its "
        "own values; give window=(center, width), or window='full', for the same greys in all images."
    )
    values = _modality_values(stored, tags)
    padding = tags.get("PixelPaddingValue")
    used = values[stored != padding] if padding is not None else None
    shown = percentile_to_eight_bit(values, used)
    return 255 - shown if _is_inverted(tags) else shown


@dataclass(frozen=True)
class _Key:
    """The elements of a chain, hashable: files of one series share their table."""

    elements: tuple[Any, ...]
    dtype: str
    tags: Any = field(compare=False)


@functools.lru_cache(maxsize=32)
def _table(key: _Key) -> np.ndarray:
    """What each stored value is shown as, in the order of the values' unsigned bits."""
    dtype = np.dtype(key.dtype)
    bits = np.arange(2 ** (8 * dtype.itemsize), dtype=f"u{dtype.itemsize}")
    return _eight_bits(bits.view(dtype), key.tags)


def _key_of(dataset: Dataset) -> tuple[Any, ...]:
    def value(element: Any) -> Any:
        if element.VR == "SQ":
            return tuple(_key_of(item) for item in element.value)
        return element.value if isinstance(element.value, bytes) else str(element.value)

    return tuple((int(element.tag), value(element)) for element in dataset)


def _eight_bits(stored: np.ndarray, tags: Dataset) -> np.ndarray:
    values = _modality_values(stored, tags)
    if luts := tags.get("VOILUTSequence"):
        shown, bits = _looked_up(values, luts[0], tags)
        low, high = 0.0, float(2**bits - 1)
    elif _has_window(tags):
        shown = _pydicom().pixels.apply_windowing(values, tags)
        low, high = _modality_range(tags)
    else:
        shown, (low, high) = values, _modality_range(tags)
    unit = (shown - low) / (high - low)  # low may be the larger one, where the slope is negative
    unit = np.clip(1 - unit if _is_inverted(tags) else unit, 0, 1)
    return np.rint(np.nan_to_num(unit) * 255).astype(np.uint8)


def _modality_values(stored: np.ndarray, tags: Dataset) -> np.ndarray:
    """float64 values in the modality's unit, such as Hounsfield's."""
    if luts := tags.get("ModalityLUTSequence"):
        return _looked_up(stored, luts[0], tags)[0]
    return _pydicom().pixels.apply_rescale(stored, tags).astype(np.float64, copy=False)


def _modality_range(tags: Dataset) -> tuple[float, float]:
    """What the smallest and the largest value that could be stored become."""
    if luts := tags.get("ModalityLUTSequence"):
        return 0.0, float(2 ** int(luts[0].LUTDescriptor[2]) - 1)
    bits = int(tags.BitsStored)
    low, high = (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1) if tags.get("PixelRepresentation") else (0, 2**bits - 1)
    if "RescaleSlope" in tags and "RescaleIntercept" in tags:
        slope, intercept = float(tags.RescaleSlope), float(tags.RescaleIntercept)
        return low * slope + intercept, high * slope + intercept
    return float(low), float(high)


def _looked_up(values: np.ndarray, item: Dataset, tags: Dataset) -> tuple[np.ndarray, int]:
    """Entries of a LUT (PS3.3 C.11.1.1, C.11.2.1.1) and their bits; values beyond its ends get its end entries."""
    # pydicom's own function wraps values around where a table of 8-bit entries has more than 256 of them.
    count, first, bits = (int(number) for number in item.LUTDescriptor)
    count = count or 2**16
    data = item.LUTData
    if isinstance(data, bytes):
        order = "<" if tags.file_meta.TransferSyntaxUID.is_little_endian else ">"
        data = np.frombuffer(data, dtype=np.uint8 if len(data) <= count + 1 else f"{order}u2")
    entries = np.asarray(data, dtype=np.float64)[:count]
    places = np.clip(np.rint(values) - first, 0, len(entries) - 1).astype(np.int64)
    return entries[places], bits


def _is_inverted(tags: Dataset) -> bool:
    shape = tags.get("PresentationLUTShape")
    return shape == "INVERSE" if shape else tags.PhotometricInterpretation == "MONOCHROME1"


def _as_list(value: Any) -> list[Any]:
    if value is None:
        return []
    return list(value) if isinstance(value, Sequence) and not isinstance(value, str) else [value]
