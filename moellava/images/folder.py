"""The images of a folder, and what lies among them without being one: `find_images`."""

from pathlib import Path
from typing import NamedTuple

from moellava.images.optional import load_optional
from moellava.images.reading import is_image_file
from moellava.images.silence import silent_libraries

_PREAMBLE = 128  # bytes of a DICOM file before the word DICM


class FoundImages(NamedTuple):
    """Files of a folder and its subfolders, sorted by path."""

    images: list[Path]
    without_pixels: list[Path]  # DICOM: structured reports, presentation states, ...


def find_images(folder: Path) -> FoundImages:
    """All image files of a folder, by suffix or content; DICOM files that hold no picture apart."""
    found = FoundImages([], [])
    for path in sorted(folder.rglob("*")):
        if is_image_file(path):
            (found.without_pixels if _lacks_pixels(path) else found.images).append(path)
    return found


def _lacks_pixels(path: Path) -> bool:
    """Whether a DICOM file has no rows of pixels; a broken one is left to the decoder."""
    with path.open("rb") as file:
        if file.read(_PREAMBLE + 4)[_PREAMBLE:] != b"DICM":
            return False
    pydicom = load_optional("pydicom", f"{path} is a DICOM file", extra="dicom")
    try:
        with silent_libraries():
            header = pydicom.dcmread(path, stop_before_pixels=True, specific_tags=["Rows"])
    except Exception:
        return False
    return "Rows" not in header
