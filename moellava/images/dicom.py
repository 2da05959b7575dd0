"""A DICOM file → the picture that a viewer would show, in 8 bits, through pydicom's decoders.

The chain is the standard's (PS3.3 C.11, PS3.4 N.2): stored values, modality LUT or rescale, VOI LUT or window,
presentation (MONOCHROME1 is inverted), then the output range, known from the header, as 0 to 255.
Only the elements named here are kept when a file is read: those of the patient and the study are never looked at.
"""

import functools
import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from moellava.images.optional import load_optional
from moellava.images.view import (
    View,
    montage,
    percentile_to_eight_bit,
    range_to_eight_bit,
    say_once,
)

Dataset = Any  # pydicom's, which is imported when the first DICOM file is read
Tags = dict[str, Any]  # values of elements by keyword

# What is kept of a file besides its pixels. Fewer names also mean less time: pydicom converts each of them per file.
_KEPT = (
    *("SOPClassUID", "Modality", "PresentationLUTShape", "NumberOfFrames", "ExtendedOffsetTable"),
    *(
        "SharedFunctionalGroupsSequence",
        "PerFrameFunctionalGroupsSequence",
        "ExtendedOffsetTableLengths",
    ),
    *(
        "Rows",
        "Columns",
        "SamplesPerPixel",
        "PhotometricInterpretation",
        "PlanarConfiguration",
        "PixelPresentation",
    ),
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
_PIXELS = (0x7FE00010, 0x7FE00009, 0x7FE00008)
_READ_WHOLE = 1 << 20  # bytes; of larger files, pixels are mapped or read frame by frame
_GREY = ("MONOCHROME1", "MONOCHROME2")
_COLOUR = ("RGB", "YBR_FULL", "YBR_FULL_422", "YBR_ICT", "YBR_RCT")
_BLOCK = 1 << 15  # pixels looked up at a time

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
        header, pixels_at = _read(source)
        _refuse_what_is_no_picture(header, name)
        view.check_size(int(header.Columns), int(header.Rows), name)
        count = int(header.get("NumberOfFrames", None) or 1)
        pictures = []
        for frame in view.frames(count, name):
            stored = _mapped_values(source, header, pixels_at, frame, name)
            if stored is None:
                stored = _stored_values(source, header, frame, name)
            pictures.append(_shown(stored, header, frame, view, name))
        view.check_size(pictures[0].shape[1] * len(pictures), pictures[0].shape[0], name)
        return montage(pictures)
    except (DicomError, MemoryError):
        raise
    except ValueError as error:
        raise DicomError(
            str(error) if str(error).startswith(name) else f"{name}: {_one_line(error)}"
        ) from error
    except (
        Exception
    ) as error:  # pydicom's parser and the decoders raise whatever a broken file leads them to
        raise DicomError(f"{name} cannot be read as DICOM: {_one_line(error)}") from error


class DicomError(ValueError):
    """Why a DICOM file gives no picture; the file is named, what it says of a patient never."""


def _read(source: Any) -> tuple[Dataset, int | None]:
    """The elements of the picture with its pixels; of a large file, those before the pixels, and where these begin."""
    pydicom = _pydicom()
    uid, pixels_at = pydicom.uid, None
    if isinstance(source, pydicom.Dataset):
        header = source
    elif isinstance(source, bytes) or Path(source).stat().st_size <= _READ_WHOLE:
        file: Any = io.BytesIO(source) if isinstance(source, bytes) else source
        header = pydicom.dcmread(file, specific_tags=[*_kept_tags(), *_PIXELS], force=True)
    else:
        with Path(source).open("rb") as file:
            header = pydicom.dcmread(
                file, stop_before_pixels=True, specific_tags=[*_kept_tags()], force=True
            )
            pixels_at = file.tell()
    meta = getattr(header, "file_meta", None)
    if (
        meta is None or "TransferSyntaxUID" not in meta
    ):  # no header of the file format: pydicom has guessed by content
        header.file_meta = meta = meta if meta is not None else pydicom.dataset.FileMetaDataset()
        is_implicit, is_little = header.original_encoding
        explicit = uid.ExplicitVRLittleEndian if is_little else uid.ExplicitVRBigEndian
        meta.TransferSyntaxUID = uid.ImplicitVRLittleEndian if is_implicit else explicit
    return header, pixels_at


def _pydicom(name: str = "This") -> Any:
    return load_optional("pydicom", f"{name} is a DICOM file", extra="dicom")


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__


@functools.cache
def _kept_tags() -> tuple[int, ...]:
    return tuple(map(_pydicom().tag.Tag, _KEPT))


@functools.cache
def _grey_numbers() -> dict[str, int]:
    return {keyword: _pydicom().tag.Tag(keyword) for keyword in _GREY_NAMES}


def _refuse_what_is_no_picture(header: Dataset, name: str) -> None:
    if header.get("Rows") is None or header.get("Columns") is None:
        uid = _pydicom().uid
        kind = uid.UID(
            str(
                header.get("SOPClassUID", "") or header.file_meta.get("MediaStorageSOPClassUID", "")
            )
        )
        if kind == uid.MediaStorageDirectoryStorage:
            raise DicomError(
                f"{name} is a DICOMDIR, the index of a disc. Give one of the image files that it lists."
            )
        what = f" of the class {kind.name!r}" if kind else ""
        raise DicomError(
            f"{name} is a DICOM file{what} without a picture: it has no rows and columns."
        )
    frames = header.get("NumberOfFrames", None)
    if frames is not None and not str(frames or "1").isdigit():
        raise DicomError(f"{name} has a broken Number of Frames, {frames!r}.")


def _mapped_values(
    source: Any, header: Dataset, pixels_at: int | None, frame: int, name: str
) -> np.ndarray | None:
    """(H, W) of a large, uncompressed grey file of 16 allocated bits, mapped instead of read; None of any other."""
    uid, syntax = _pydicom().uid, header.file_meta.TransferSyntaxUID
    heads = {
        uid.ExplicitVRLittleEndian: 12,
        uid.ImplicitVRLittleEndian: 8,
    }  # bytes before the pixels (PS3.5, 7.1)
    is_plain = _is_grey_of_16_bits(header) and header.get("SamplesPerPixel") == 1
    if pixels_at is None or syntax not in heads or not is_plain:
        return None
    with Path(source).open("rb") as file:
        file.seek(pixels_at)
        head = file.read(heads[syntax])
    start, frame_bytes = pixels_at + len(head), int(header.Rows) * int(header.Columns) * 2
    end, there = start + (frame + 1) * frame_bytes, start + int.from_bytes(head[-4:], "little")
    if head[:4] != b"\xe0\x7f\x10\x00" or end > there:
        return None  # float or broken: pydicom says what is wrong
    if there > (size := Path(source).stat().st_size):
        raise DicomError(
            f"{name} is cut short: its pixels should end at byte {there:,}, and it has {size:,}."
        )
    kind = "<i2" if header.get("PixelRepresentation") else "<u2"
    return np.asarray(
        np.memmap(source, kind, "r", end - frame_bytes, (int(header.Rows), int(header.Columns)))
    )


def _is_grey_of_16_bits(header: Dataset) -> bool:
    return header.get("PhotometricInterpretation") in _GREY and header.get("BitsAllocated") == 16


def _stored_values(source: Any, header: Dataset, frame: int, name: str) -> np.ndarray:
    """(H, W) or (H, W, 3), colours converted to RGB, of one frame; other frames are not decoded.

    Grey values of 16 allocated bits still have what stands in their unused bits.
    """
    pydicom = _pydicom()
    # pydicom would copy all pixels and shift them to and fro; the table of what is shown does that per value.
    corrects = not _is_grey_of_16_bits(header)
    pixel_array = functools.partial(
        pydicom.pixels.pixel_array, index=frame, correct_unused_bits=corrects
    )
    syntax = header.file_meta.TransferSyntaxUID
    has_pixels = any(tag in header for tag in _PIXELS)
    try:
        if has_pixels:
            return pixel_array(header, view_only=True)  # not copied; nothing here writes into it
        if isinstance(source, (str, Path)) and syntax != pydicom.uid.DeflatedExplicitVRLittleEndian:
            return pixel_array(source, transfer_syntax_uid=syntax)
        return pixel_array(pydicom.dcmread(source, specific_tags=[*_kept_tags(), *_PIXELS]))
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
        raise DicomError(
            f"{name} is in colour ({kind}); a window is for grey images. Leave window out."
        )
    if kind == "PALETTE COLOR":
        colours = _pydicom().pixels.apply_color_lut(stored, header)[..., :3]
        # Entries of 8 bits may be stored in the upper half of 16.
        return colours if colours.dtype == np.uint8 else (colours >> 8).astype(np.uint8)
    if kind not in _COLOUR or stored.ndim != 3:
        raise DicomError(
            f"{name} has the photometric interpretation {kind!r}; expected {', '.join(_GREY + _COLOUR)}."
        )
    bits = int(header.BitsStored)
    return (
        stored
        if stored.dtype == np.uint8 and bits == 8
        else range_to_eight_bit(stored, 0, 2**bits - 1)
    )


# -- grey values


def _grey_tags(header: Dataset, frame: int) -> Tags:
    """The elements that decide how grey values are shown, by keyword; none is empty.

    Enhanced multi-frame files keep them in functional groups.
    """
    groups = [header]
    for sequence, item in (
        ("SharedFunctionalGroupsSequence", 0),
        ("PerFrameFunctionalGroupsSequence", frame),
    ):
        items = header.get(sequence) or []
        if item < len(items):
            for macro in ("PixelValueTransformationSequence", "FrameVOILUTSequence"):
                groups += items[item].get(macro) or []
    found = {
        keyword: group[tag].value
        for group in groups
        for keyword, tag in _grey_numbers().items()
        if tag in group
    }
    tags = {keyword: value for keyword, value in found.items() if value not in (None, "")}
    return {
        **tags,
        "PhotometricInterpretation": header.PhotometricInterpretation,
        "file_meta": header.file_meta,
    }


def _choose_window(tags: Tags, view: View, name: str) -> None:
    """Put the window asked for in the place of the file's own."""
    if view.window == "full":
        _forget_window(tags)
        return
    limits = view.limits()
    if isinstance(view.window, str) and not _is_ct(tags):
        raise DicomError(
            f"{name}: the window {view.window!r} is in Hounsfield units, and this is "
            f"{tags.get('Modality', 'no modality')}, not CT. Give (center, width), or leave window out."
        )
    if isinstance(view.window, int):
        _choose_own(tags, view.window, name)
    elif limits is None and not _has_window(tags) and _is_ct(tags) and "RescaleIntercept" in tags:
        say_once(
            "A CT image without a window of its own is shown in the soft-tissue window; choose with window=."
        )
        limits = View(window="soft").limits()
    if limits is not None:
        _forget_window(tags)
        tags["WindowCenter"], tags["WindowWidth"] = limits


def _choose_own(tags: Tags, index: int, name: str) -> None:
    luts = tags.get("VOILUTSequence", [])
    centers, widths = (_as_list(tags.get(keyword)) for keyword in ("WindowCenter", "WindowWidth"))
    count = len(luts) or min(len(centers), len(widths))
    if not 0 <= index < count:
        raise DicomError(f"{name} has no window {index}: it has {count} of its own.")
    if luts:
        tags["VOILUTSequence"] = [luts[index]]
    else:
        tags["WindowCenter"], tags["WindowWidth"] = centers[index], widths[index]


def _forget_window(tags: Tags) -> None:
    for keyword in ("WindowCenter", "WindowWidth", "VOILUTFunction", "VOILUTSequence"):
        tags.pop(keyword, None)


def _has_window(tags: Tags) -> bool:
    return bool(tags.get("VOILUTSequence")) or ("WindowCenter" in tags and "WindowWidth" in tags)


def _is_ct(tags: Tags) -> bool:
    return tags.get("Modality") == "CT" or tags.get("RescaleType") == "HU"


def _grey_picture(stored: np.ndarray, tags: Tags, *, full: bool) -> np.ndarray:
    """What is shown is a function of the stored value alone: it is computed once for each one that may occur."""
    is_integer = stored.dtype.kind in "ui"
    narrow = is_integer and int(tags.get("BitsStored", 16)) <= 8
    if not _has_window(tags) and not full and not narrow:
        return _without_window(_used_bits(stored, tags), tags)
    if not is_integer or stored.dtype.itemsize > 2:
        return _eight_bits(stored, tags)
    stored = stored.astype(stored.dtype.newbyteorder("="), copy=False)
    values = np.arange(int(stored.min()), int(stored.max()) + 1).astype(stored.dtype)
    if len(values) > stored.size:
        return _eight_bits(_used_bits(stored, tags), tags)
    unsigned = f"u{stored.dtype.itemsize}"
    places, shown_values = stored.view(unsigned), _eight_bits(_used_bits(values, tags), tags)
    if np.array_equal(shown_values, values.view(unsigned)):
        return places.astype(np.uint8, copy=False)
    table = np.empty(2 ** (8 * stored.dtype.itemsize), np.uint8)
    table[values.view(unsigned)] = shown_values
    if len(table) == 256:
        return np.asarray(Image.fromarray(places).point(table.tolist()))
    shown, step = np.empty(stored.shape, np.uint8), max(1, _BLOCK // stored.shape[1])
    for top in range(0, len(places), step):
        # By blocks that stay in the cache: numpy widens the places to 64 bits. "clip" spares a check that cannot fail.
        np.take(table, places[top : top + step], out=shown[top : top + step], mode="clip")
    return shown


def _used_bits(stored: np.ndarray, tags: Tags) -> np.ndarray:
    """Of values of 16 allocated bits only those that are stored, with the sign of the highest (PS3.5, 8.1.1)."""
    unused = 16 - int(tags.get("BitsStored", 16))
    if stored.dtype.kind not in "ui" or stored.dtype.itemsize != 2 or unused <= 0:
        return stored
    return (stored << unused) >> unused


def _without_window(stored: np.ndarray, tags: Tags) -> np.ndarray:
    say_once(
        "A DICOM image of more than 8 bits without a window is shown between the 0.5th and 99.5th percentile of its "
        "own values; give window=(center, width), or window='full', for the same greys in all images."
    )
    values = _modality_values(stored, tags)
    padding = tags.get("PixelPaddingValue")
    used = values[stored != padding] if padding is not None else None
    shown = percentile_to_eight_bit(values, used)
    return 255 - shown if _is_inverted(tags) else shown


def _eight_bits(stored: np.ndarray, tags: Tags) -> np.ndarray:
    values = _modality_values(stored, tags)
    if luts := tags.get("VOILUTSequence"):
        entries, bits = _looked_up(values, luts[0], tags)
        unit = entries / (2**bits - 1)
    elif _has_window(tags):
        unit = _windowed(values, tags)
    else:
        low, high = _modality_range(tags)
        unit = (values - low) / (high - low)
    unit = np.clip(1 - unit if _is_inverted(tags) else unit, 0, 1)
    return np.rint(np.nan_to_num(unit) * 255).astype(np.uint8)


def _modality_values(stored: np.ndarray, tags: Tags) -> np.ndarray:
    """float64 values in the modality's unit, such as Hounsfield's."""
    if luts := tags.get("ModalityLUTSequence"):
        return _looked_up(stored, luts[0], tags)[0]
    slope, intercept = _rescale(tags)
    return stored.astype(np.float64) * slope + intercept


def _modality_range(tags: Tags) -> tuple[float, float]:
    """The smallest and the largest value that the stored bits can stand for."""
    if luts := tags.get("ModalityLUTSequence"):
        return 0.0, float(2 ** int(luts[0].LUTDescriptor[2]) - 1)
    bits = int(tags["BitsStored"])
    ends = (
        (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1)
        if tags.get("PixelRepresentation")
        else (0, 2**bits - 1)
    )
    slope, intercept = _rescale(tags)
    low, high = sorted(end * slope + intercept for end in ends)
    return low, high


def _rescale(tags: Tags) -> tuple[float, float]:
    if "RescaleSlope" in tags and "RescaleIntercept" in tags:
        return float(tags["RescaleSlope"]), float(tags["RescaleIntercept"])
    return 1.0, 0.0


def _windowed(values: np.ndarray, tags: Tags) -> np.ndarray:
    """The first window's share of the output range for each value: below 0 before the window, above 1 behind it.

    PS3.3 C.11.2.1.2 and C.11.2.1.3; pydicom's function writes the same into a range of the dataset's.
    """
    center, width = (
        float(_as_list(tags[keyword])[0]) for keyword in ("WindowCenter", "WindowWidth")
    )
    function = str(tags.get("VOILUTFunction", "LINEAR")).upper()
    if function not in ("LINEAR", "LINEAR_EXACT", "SIGMOID"):
        raise ValueError(
            f"The VOI LUT Function is {function!r}; expected LINEAR, LINEAR_EXACT or SIGMOID."
        )
    if width < 1 and (function == "LINEAR" or width <= 0):
        least = "at least 1" if function == "LINEAR" else "more than 0"
        raise ValueError(f"The Window Width is {width:g}; expected {least}.")
    if function == "SIGMOID":
        return 1 / (1 + np.exp(-4 * (values - center) / width))
    if function == "LINEAR":
        center, width = center - 0.5, width - 1
    if width == 0:
        return np.where(values > center, 1.0, 0.0)
    return (values - center) / width + 0.5


def _looked_up(values: np.ndarray, item: Dataset, tags: Tags) -> tuple[np.ndarray, int]:
    """Entries of a LUT (PS3.3 C.11.1.1, C.11.2.1.1) and their bits; values beyond its ends get its end entries."""
    # pydicom's own function wraps values around where a table of 8-bit entries has more than 256 of them.
    count, first, bits = (int(number) for number in item.LUTDescriptor)
    count = count or 2**16
    data = item.LUTData
    if isinstance(data, bytes):
        order = "<" if tags["file_meta"].TransferSyntaxUID.is_little_endian else ">"
        data = np.frombuffer(data, dtype=np.uint8 if len(data) <= count + 1 else f"{order}u2")
    entries = np.asarray(data, dtype=np.float64)[:count]
    places = np.clip(np.rint(values) - first, 0, len(entries) - 1).astype(np.int64)
    return entries[places], bits


def _is_inverted(tags: Tags) -> bool:
    shape = tags.get("PresentationLUTShape")
    return shape == "INVERSE" if shape else tags["PhotometricInterpretation"] == "MONOCHROME1"


def _as_list(value: Any) -> list[Any]:
    if value is None:
        return []
    return list(value) if isinstance(value, Sequence) and not isinstance(value, str) else [value]
