"""Image files of any kind, DICOM and NIfTI included, to a PIL image: the lowest room, used by all others."""

from moellava.images.reading import (
    IMAGE_SUFFIXES,
    array_to_pil,
    is_image_file,
    read_image,
    to_eight_bit,
    to_pil,
)
from moellava.images.types import ImageLike, Images
from moellava.images.view import MAX_PIXELS, PLANES, WINDOWS, View, parse_frame, parse_window

__all__ = [
    "IMAGE_SUFFIXES",
    "ImageLike",
    "Images",
    "MAX_PIXELS",
    "PLANES",
    "WINDOWS",
    "View",
    "array_to_pil",
    "is_image_file",
    "parse_frame",
    "parse_window",
    "read_image",
    "to_eight_bit",
    "to_pil",
]
