"""A DICOM file → the picture that a viewer would show, in 8 bits, through pydicom's decoders.

The chain is the standard's (PS3.3 C.11, PS3.4 N.2): stored values, modality LUT or rescale, VOI LUT
or window, presentation (MONOCHROME1 is inverted), then the output range, known from the header, as
0 to 255.
"""

from pathlib import Path

import numpy as np
from PIL import Image

from moellava.images.dicom_error import DicomError, reason_without_values
from moellava.images.dicom_file import (
    GREY,
    DicomFile,
    pydicom_module,
    read_dicom,
)
from moellava.images.dicom_grey import grey_picture, grey_tags, shown_in
from moellava.images.image_like import DicomDataset
from moellava.images.silence import silent_libraries
from moellava.images.view import View, grid_shape, montage, range_to_eight_bit
from moellava.storage.limits import require_within

_COLOUR = ("RGB", "YBR_FULL", "YBR_FULL_422", "YBR_ICT", "YBR_RCT")


def decode_dicom(source: Path | bytes | DicomDataset, view: View, name: str) -> Image.Image:
    """An "L" or "RGB" picture of a file, its bytes, or a dataset.

    Raises:
        ImportError: pydicom is not installed.
        DicomError: no picture in it, broken, no such frame or window, or no decoder for its
            compression.
    """
    pydicom_module(name)
    try:
        with silent_libraries():
            return Image.fromarray(_decode(source, view, name))
    except (DicomError, MemoryError):
        raise
    # pydicom's parser and the decoders raise whatever a broken file leads them to, with values of
    # its elements in the text: neither text nor cause is shown.
    except Exception as error:
        text = str(error)
        if isinstance(error, ValueError) and text.startswith(name):  # of the view
            raise DicomError(text) from None
        reason = reason_without_values(error)
        raise DicomError(f"{name} cannot be read as DICOM: it is broken ({reason}).") from None


def _decode(source: Path | bytes | DicomDataset, view: View, name: str) -> np.ndarray:
    file = read_dicom(source, name)
    width, height = int(file.header.Columns), int(file.header.Rows)
    view.refuse_plane(name)
    view.check_size(width, height, name)
    frames = view.frames(file.num_frames, name)
    rows, columns = grid_shape(len(frames))
    view.check_size(columns * width, rows * height, name)
    _check_bytes(file)
    return montage((_shown(file, frame, view) for frame in frames), len(frames))


def _check_bytes(file: DicomFile) -> None:
    """Refuse a frame that takes too many bytes once decoded, before it is."""
    header = file.header
    samples, bits = (int(header.get(name) or 1) for name in ("SamplesPerPixel", "BitsAllocated"))
    bytes_each = max(1, bits // 8) if bits <= 16 else 8
    if samples > 1:
        bytes_each *= 2 * samples  # pydicom converts colours in float32
    require_within("frame", int(header.Columns) * int(header.Rows) * bytes_each, file.name)


def _shown(file: DicomFile, frame: int, view: View) -> np.ndarray:
    """(H, W) or (H, W, 3) uint8 of one frame."""
    stored, header = file.values(frame), file.header
    kind = str(header.get("PhotometricInterpretation") or "").strip()
    if not kind:
        raise DicomError(f"{file.name} has no Photometric Interpretation.")
    if kind in GREY:
        own = grey_tags(header, frame)

        def show(one: View) -> np.ndarray:
            tags = shown_in(own, one, file.name)
            return grey_picture(stored, tags, file.name, full=one.window == "full")

        return view.in_channels(show)
    if view.has_window:
        raise DicomError(
            f"{file.name} is in colour; a window is for grey images. Leave window out."
        )
    if kind == "PALETTE COLOR":
        colours = pydicom_module().pixels.apply_color_lut(stored, header)[..., :3]
        # Entries of 8 bits may be stored in the upper half of 16.
        return np.asarray(colours if colours.dtype == np.uint8 else (colours >> 8).astype(np.uint8))
    if kind not in _COLOUR or stored.ndim != 3:
        raise DicomError(
            f"{file.name} has an unknown Photometric Interpretation; "
            f"expected {', '.join(GREY + _COLOUR)}."
        )
    bits = int(header.BitsStored)
    if stored.dtype == np.uint8 and bits == 8:
        return stored
    return range_to_eight_bit(stored, 0, 2**bits - 1)
