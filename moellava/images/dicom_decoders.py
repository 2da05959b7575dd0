"""Compressed DICOM pixels: which of pydicom's plug-ins decode them, and what a frame may hold.

gdcm is never used, even where it is installed: a broken JPEG makes it abort the whole process.
"""

import struct
from collections.abc import Callable, Sequence

import numpy as np

from moellava.images.dicom_error import DicomError, reason_without_values
from moellava.images.optional import load_optional

# As pydicom calls them: its own is for run-length encoding.
SAFE_PLUGINS = ("pydicom", "pylibjpeg", "pyjpegls", "pillow")

_LIBJPEG = "pylibjpeg pylibjpeg-libjpeg  (GPLv3)"  # for its licence, no extra installs it
_OPENJPEG = "pylibjpeg pylibjpeg-openjpeg"
# What to install, by the UID of the transfer syntax. Pillow and pydicom decode the others.
PACKAGES = {
    "1.2.840.10008.1.2.4.51": _LIBJPEG,
    "1.2.840.10008.1.2.4.57": _LIBJPEG,
    "1.2.840.10008.1.2.4.70": _LIBJPEG,
    "1.2.840.10008.1.2.4.80": "pyjpegls",
    "1.2.840.10008.1.2.4.81": "pyjpegls",
    "1.2.840.10008.1.2.4.90": _OPENJPEG,
    "1.2.840.10008.1.2.4.91": _OPENJPEG,
    "1.2.840.10008.1.2.4.201": _OPENJPEG,
    "1.2.840.10008.1.2.4.202": _OPENJPEG,
    "1.2.840.10008.1.2.4.203": _OPENJPEG,
}
_SIZE_OF_JPEG_2000 = b"\xff\x4f\xff\x51"  # start of codestream, then the segment of sizes
# Start of frame: of JPEG without the markers of tables among them (T.81, table B.1), of JPEG-LS.
_STARTS_OF_FRAME = {*range(0xC0, 0xD0), 0xF7} - {0xC4, 0xC8, 0xCC}


def safe_plugins(syntax: str) -> list[str]:
    """The installed plug-ins for a transfer syntax, in pydicom's order, without unsafe ones.

    [""] for pixels that are not compressed, which need none.
    """
    pixels = load_optional("pydicom.pixels", "This is a DICOM file", extra="dicom")
    try:
        decoder = pixels.get_decoder(syntax)
    except NotImplementedError:
        return []
    if decoder.is_native:
        return [""]
    plugins = [plugin for plugin in decoder.available_plugins if plugin in SAFE_PLUGINS]
    # pylibjpeg-rle prints a backtrace for broken data.
    return ["pydicom"] if "pydicom" in plugins else plugins


def decoded_by(
    plugins: Sequence[str], decode: Callable[[str], np.ndarray], syntax: str, name: str
) -> np.ndarray:
    """What the first plug-in that can gives.

    Raises:
        DicomError: none of them can; the package to install is named.
    """
    reason = ""
    for plugin in plugins:
        try:
            return decode(plugin)
        except RuntimeError as error:  # noqa: PERF203
            reason = f" ({reason_without_values(error)})"
    hint = f" Type: pip install {PACKAGES[syntax]}" if syntax in PACKAGES else ""
    names = load_optional("pydicom.uid", "This is a DICOM file", extra="dicom").UID_dictionary
    what = names[syntax][0] if syntax in names else "an unknown transfer syntax"
    raise DicomError(f"{name}: no installed decoder reads its pixels ({what}).{hint}{reason}")


def codestream_size(data: bytes) -> tuple[int, int] | None:
    """(columns, rows) that a JPEG, JPEG-LS or JPEG 2000 picture asks for; None if it says none.

    Sources: T.81 B.2.2, T.87 C.2.2, T.800 A.5.1.
    """
    begin = data.find(_SIZE_OF_JPEG_2000, 0, 1024)  # a header of the JP2 format may stand before
    try:
        if begin >= 0:
            right, bottom, left, top = struct.unpack_from(">4I", data, begin + 8)
            return right - left, bottom - top
        place = 2
        while data[place] == 0xFF:
            if data[place + 1] in _STARTS_OF_FRAME:
                rows, columns = struct.unpack_from(">2H", data, place + 5)
                return columns, rows
            place += 2 + int.from_bytes(data[place + 2 : place + 4], "big")
    except (IndexError, struct.error):
        pass
    return None
