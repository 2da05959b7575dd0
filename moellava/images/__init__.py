"""Image files of any kind, DICOM and NIfTI included, to a PIL image; used by all other packages."""

from moellava.images.eight_bit import array_to_pil, to_eight_bit
from moellava.images.identity import exact_hash, image_key
from moellava.images.image_like import ImageLike, ImagePart, Images
from moellava.images.info import ImageInfo, describe_image
from moellava.images.kinds import ImageKind, image_suffixes, register_image_kind
from moellava.images.parts import PART_OPTIONS, PartOptions, image_parts, opened, with_words
from moellava.images.reading import ViewOptions, is_image_file, load_image, to_pil
from moellava.images.series import sort_series
from moellava.images.threads import as_image_list, map_in_threads
from moellava.images.view import MAX_PIXELS, PLANES, WINDOWS, View

__all__ = [
    "MAX_PIXELS",
    "PART_OPTIONS",
    "PLANES",
    "WINDOWS",
    "ImageInfo",
    "ImageKind",
    "ImageLike",
    "ImagePart",
    "Images",
    "PartOptions",
    "View",
    "ViewOptions",
    "array_to_pil",
    "as_image_list",
    "describe_image",
    "exact_hash",
    "image_key",
    "image_parts",
    "image_suffixes",
    "is_image_file",
    "load_image",
    "map_in_threads",
    "opened",
    "register_image_kind",
    "sort_series",
    "to_eight_bit",
    "to_pil",
    "with_words",
]
