"""The kinds of image files that can be read, and how each is recognised: `IMAGE_KINDS`.

`register_image_kind` adds one; an installed package can do that through the entry-point group
`moellava.images`.
"""

import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image

from moellava.images.dicom import decode_dicom
from moellava.images.nifti import decode_nifti
from moellava.images.picture import decode_picture
from moellava.images.view import View
from moellava.plugins import load_plugins

HEADER_BYTES = 4096  # of a file, what `recognises` is given

# Path, bytes, or an object of one of the kind's libraries.
Decode = Callable[[Any, View, str], Image.Image]


@dataclass(frozen=True, kw_only=True)
class ImageKind:
    """One kind of image file.

    Args:
        name: as messages write it.
        suffixes: lower case, with the dot; the first is given to files that are written.
        recognises: whether a file of this kind starts with these bytes, of which there are at most
            `HEADER_BYTES`.
        decode: `(path or bytes, view, name for messages) -> picture`; raises a `ValueError` that
            begins with that name.
        file_names: whole names, in lower case, that files without a suffix have.
        libraries: packages whose own objects `decode` takes, too.
    """

    name: str
    suffixes: tuple[str, ...]
    recognises: Callable[[bytes], bool]
    decode: Decode
    file_names: tuple[str, ...] = ()
    libraries: tuple[str, ...] = ()


def starts_with(*signatures: bytes) -> Callable[[bytes], bool]:
    """For `ImageKind.recognises`: the signatures that files of a kind start with."""
    return lambda start: start.startswith(signatures)


def is_dicom(start: bytes) -> bool:
    """Whether the word DICM follows the preamble of 128 bytes."""
    return start[128:132] == b"DICM"


def is_nifti(start: bytes) -> bool:
    """Whether a header of NIfTI-1 or NIfTI-2, volumes and header in one file, begins here."""
    return start[344:348] == b"n+1\0" or start[4:8] == b"n+2\0"


def is_gzipped_nifti(start: bytes) -> bool:
    """The same behind gzip's compression."""
    if not start.startswith(b"\x1f\x8b"):
        return False
    try:
        return is_nifti(zlib.decompressobj(wbits=31).decompress(start, 352))
    except zlib.error:
        return False


def _plain(name: str, suffixes: tuple[str, ...], recognises: Callable[[bytes], bool]) -> ImageKind:
    return ImageKind(name=name, suffixes=suffixes, recognises=recognises, decode=decode_picture)


# The first match wins: some DICOM files carry the header of a TIFF in their preamble.
IMAGE_KINDS: list[ImageKind] = [
    _plain("PNG", (".png",), starts_with(b"\x89PNG")),
    _plain("JPEG", (".jpg", ".jpeg"), starts_with(b"\xff\xd8\xff")),
    _plain("GIF", (".gif",), starts_with(b"GIF8")),
    _plain("WebP", (".webp",), lambda start: start[:4] == b"RIFF" and start[8:12] == b"WEBP"),
    ImageKind(
        name="DICOM",
        suffixes=(".dcm", ".dicom", ".ima"),
        recognises=is_dicom,
        decode=decode_dicom,
        file_names=("dicomdir",),
        libraries=("pydicom", "highdicom"),
    ),
    ImageKind(
        name="NIfTI",
        suffixes=(".nii",),
        recognises=is_nifti,
        decode=decode_nifti,
        libraries=("nibabel",),
    ),
    ImageKind(
        name="gzipped NIfTI",
        suffixes=(".nii.gz",),
        recognises=is_gzipped_nifti,
        decode=decode_nifti,
    ),
    _plain("TIFF", (".tif", ".tiff"), starts_with(b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")),
    _plain("BMP", (".bmp",), starts_with(b"BM")),
]


def register_image_kind(kind: ImageKind) -> None:
    """Read another kind of image file wherever images are read; it is asked before the others.

    Raises:
        ValueError: another kind has the name.
    """
    same_name = next((known for known in IMAGE_KINDS if known.name == kind.name), None)
    if same_name is None:
        IMAGE_KINDS.insert(0, kind)
    elif same_name != kind:
        raise ValueError(f"The image kind {kind.name!r} is registered already. Give another name.")


def image_kinds() -> Sequence[ImageKind]:
    """All kinds in the order in which they are asked, those of installed packages included."""
    load_plugins("moellava.images")
    return IMAGE_KINDS


def image_suffixes() -> tuple[str, ...]:
    """The suffixes of all kinds."""
    return tuple(suffix for kind in image_kinds() for suffix in kind.suffixes)


def kind_of_bytes(start: bytes) -> ImageKind | None:
    """The kind of a file that starts with these bytes; None for one that only Pillow may know."""
    return next((kind for kind in image_kinds() if kind.recognises(start)), None)


def kind_of_file(path: Path, start: bytes) -> ImageKind | None:
    """The kind of a file: by its first bytes, or else by its name."""
    name = path.name.lower()
    by_name = (
        kind for kind in image_kinds() if name.endswith(kind.suffixes) or name in kind.file_names
    )
    return kind_of_bytes(start) or next(by_name, None)


def kind_of_object(image: object) -> ImageKind | None:
    """The kind whose library an object in memory comes from, such as a `pydicom.Dataset`."""
    library = type(image).__module__.partition(".")[0]
    return next((kind for kind in image_kinds() if library in kind.libraries), None)
