"""An image that stands for several pictures → its parts in order: slices, frames, tiles of a slide.

| name | gives |
|---|---|
| `image_parts` | the parts, none of which is opened yet |
| `with_words` | the parts and the words before each, as a message has them |
| `PartOptions` | the options of both, those of `View` among them |

`moellava.images.to_pil` opens a part.
"""

import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import cast

from PIL import Image
from typing_extensions import Unpack

from moellava.images.dicom_file import read_dicom
from moellava.images.image_like import ImageLike, ImagePart, SlideRegion
from moellava.images.kinds import (
    HEADER_BYTES,
    ImageKind,
    kind_of_bytes,
    kind_of_file,
    kind_of_object,
)
from moellava.images.nifti import plane_sizes
from moellava.images.picture import count_frames
from moellava.images.reading import ViewOptions, naming_errors, to_pil
from moellava.images.series import read_series
from moellava.images.slide import check_region, tissue_tiles
from moellava.images.view import PLANES, View
from moellava.messages import unknown_name
from moellava.storage.limits import require_within

TILE_SIDE = 512  # pixels of a slide's tile, unless told otherwise

Numbers = int | Mapping[str, object]


class PartOptions(ViewOptions, total=False):
    """How an image is seen, and which of its pictures: one of `slices`, `frames`, `slide`.

    Args:
        slices: of a NIfTI volume or of a folder with one DICOM series: how many, or `{"num": 8,
            "plane": "axial", "first": 0, "last": -1}`. The range from `first` to `last` (from left,
            back or feet) is cut into `num` equal parts, and the slice in the middle of each taken.
            `plane`, which may stand beside `slices`, is axial for a volume; a series has the plane
            that it was taken in.
        frames: the same of a multi-frame DICOM file or an animation, without `plane`.
        slide: of a whole-slide image: `{"region": [x, y, width, height], "level": 0}`, with x and y
            in pixels of level 0 and the size in pixels of the level; or `{"max_tiles": 6,
            "overview": True, "level": 0, "side": 512}`, see `moellava.images.slide.tissue_tiles`.
    """

    slices: Numbers | None
    frames: Numbers | None
    slide: Mapping[str, object] | None


PART_OPTIONS = tuple(PartOptions.__annotations__)
_SEVERAL = ("slices", "frames", "slide")


def image_parts(image: ImageLike, **options: Unpack[PartOptions]) -> list[ImagePart]:
    """The pictures that an image stands for, in order; one, without words, for most images.

    Only headers are read, and of a slide the overview that its tiles are chosen by.

    Raises:
        ImportError: a library for the file is not installed.
        ValueError, OSError: options that do not go together or with the image, fewer pictures than
            asked for, a broken file; it is named.
    """
    given = {name: value for name, value in options.items() if value is not None}
    if isinstance(image, ImagePart) and not given:
        return [image]
    unknown = [name for name in given if name not in PART_OPTIONS]
    if unknown:
        raise unknown_name("option of an image", unknown[0], PART_OPTIONS)
    chosen = [name for name in _SEVERAL if name in given]
    view = {name: value for name, value in given.items() if name not in _SEVERAL}
    seen = View(**view)  # type: ignore[arg-type]  # each value has the type of its option
    if not chosen:
        return [ImagePart(image, seen)]
    if len(chosen) > 1:
        raise ValueError(f"{' and '.join(chosen)} are both given. Leave all but one of them out.")
    name = chosen[0]
    if "frame" in view or ("plane" in view and name != "slices"):
        other = "frame" if "frame" in view else "plane"
        raise ValueError(f"{other} and {name} are both given. Leave {other} out.")
    if isinstance(image, Mapping) and "bytes" in image and "path" in image:  # of the hub
        image = cast(ImageLike, image["path"] if image["bytes"] is None else image["bytes"])
    if isinstance(image, str | os.PathLike):
        image = Path(image).expanduser()
        if not image.exists():
            raise FileNotFoundError(f"The image {image} does not exist.")
    return {"slices": _slices, "frames": _frames, "slide": _slide}[name](image, given[name], seen)


def opened(part: ImagePart) -> ImagePart:
    """The part with its picture in memory."""
    return replace(part, source=to_pil(part), view=View(), region=None)


def with_words(parts: Iterable[ImagePart]) -> list[str | ImagePart]:
    """Each part behind the words that say where it lies, such as "slice 3 of 8, axial: "."""
    items: list[str | ImagePart] = []
    for part in parts:
        items += [f"{part.place}: ", part] if part.place else [part]
    return items


def spaced(num: int, count: int, first: int, last: int, name: str) -> list[int]:
    """The numbers in the middle of each of `num` equal parts of the range, both ends included.

    Raises:
        ValueError: the range is not within `count`, or shorter than `num`.
    """
    ends = [end + count if end < 0 else end for end in (first, last)]
    if not 0 <= ends[0] <= ends[1] < count:
        raise ValueError(
            f"{name} has {count}, 0 to {count - 1}; the range from {first} to {last} is not "
            "within that."
        )
    length = ends[1] - ends[0] + 1
    if num > length:
        raise ValueError(f"{name} has {length} in the range, and num is {num}. Ask for fewer.")
    return [ends[0] + (2 * place + 1) * length // (2 * num) for place in range(num)]


def _slices(image: ImageLike, value: object, view: View) -> list[ImagePart]:
    num, first, last, plane = _numbers("slices", value, has_plane=True, plane=view.plane)
    view = replace(view, plane=None)
    name = _name_of(image)
    if isinstance(image, Path) and image.is_dir():
        return _slices_of_series(image, num, first, last, plane, view)
    kind = _kind_of(image)
    if kind is None or "NIfTI" not in kind.name:
        is_dicom = kind is not None and kind.name == "DICOM"
        hint = " A DICOM series is given as its folder; frames= is for the frames of a file."
        raise ValueError(
            f"{name} is not a volume; slices= is for NIfTI and for folders with a DICOM series."
            f"{hint if is_dicom else ''}"
        )
    plane = plane or "axial"
    with naming_errors(name):
        count = plane_sizes(cast(bytes, image), name)[plane]
    numbers = spaced(num, count, first, last, f"{name}: of {plane} slices the volume")
    return [
        ImagePart(image, replace(view, frame=number, plane=plane), f"slice {at} of {num}, {plane}")
        for at, number in enumerate(numbers, start=1)
    ]


def _slices_of_series(
    folder: Path, num: int, first: int, last: int, plane: str | None, view: View
) -> list[ImagePart]:
    series = read_series(folder)
    if plane not in (None, series.plane):
        raise ValueError(
            f"{folder} holds {series.plane} slices, not {plane} ones, which would take all of its "
            "files. Leave plane out, or make a NIfTI volume of it."
        )
    view.refuse_plane(str(folder))
    numbers = spaced(num, len(series.files), first, last, f"{folder}: of slices the series")
    return [
        ImagePart(series.files[number], view, f"slice {at} of {num}, {series.plane}")
        for at, number in enumerate(numbers, start=1)
    ]


def _frames(image: ImageLike, value: object, view: View) -> list[ImagePart]:
    num, first, last, _ = _numbers("frames", value, has_plane=False)
    name = _name_of(image)
    if isinstance(image, Path) and image.is_dir():
        raise ValueError(f"{name} is a folder; frames= is for one file. For a series: slices=.")
    kind = _kind_of(image)
    if kind is not None and "NIfTI" in kind.name:
        raise ValueError(f"{name} is a volume, which has no frames. Give slices=.")
    with naming_errors(name):
        if kind is not None and kind.name == "DICOM":
            count = read_dicom(cast(bytes, image), name).num_frames
        elif isinstance(image, Path | bytes | Image.Image):
            count = count_frames(image, name)
        else:
            count = 1
    numbers = spaced(num, count, first, last, f"{name}: of frames the file")
    return [
        ImagePart(image, replace(view, frame=number), f"frame {at} of {num}")
        for at, number in enumerate(numbers, start=1)
    ]


def _slide(image: ImageLike, value: object, view: View) -> list[ImagePart]:
    if not isinstance(value, Mapping):
        raise ValueError(f"slide is {value!r}; expected a mapping with 'region' or 'max_tiles'.")
    if view != View(max_pixels=view.max_pixels):
        raise ValueError("A slide is in colour, and has no windows. Leave window out.")
    name, level = _name_of(image), _whole(value, "slide", "level", 0)
    if "region" in value:
        _require_keys("slide", value, ("region", "level"))
        box = value["region"]
        is_box = isinstance(box, Sequence) and len(box) == 4 and all(map(_is_whole, box))
        if not is_box or isinstance(box, str):
            raise ValueError(f"slide's region is {box!r}; expected [x, y, width, height].")
        x, y, width, height = box
        region = SlideRegion(x, y, width, height, level)
        with naming_errors(name):
            check_region(image, region, view.max_pixels, name)
        return [ImagePart(image, view, region=region)]
    _require_keys("slide", value, ("max_tiles", "overview", "level", "side"))
    most = _whole(value, "slide", "max_tiles", None, least=1)
    side = _whole(value, "slide", "side", TILE_SIDE, least=64)
    require_within("pictures", most, "slide")
    overview = value.get("overview", True)
    if not isinstance(overview, bool):
        raise ValueError(f"slide's overview is {overview!r}; expected true or false.")
    with naming_errors(name):
        whole, tiles = tissue_tiles(
            image, most=most, level=level, side=side, max_pixels=view.max_pixels, name=name
        )
    parts = [ImagePart(image, view, "overview", whole)] if overview else []
    return parts + [
        ImagePart(image, view, f"tile {at} of {len(tiles)}", tile)
        for at, tile in enumerate(tiles, start=1)
    ]


def _numbers(
    option: str, value: object, *, has_plane: bool, plane: str | None = None
) -> tuple[int, int, int, str | None]:
    """`num`, `first`, `last` and `plane` of what was given for slices or frames."""
    given = value if isinstance(value, Mapping) else {"num": value}
    known = ("num", "first", "last", *(("plane",) if has_plane else ()))
    _require_keys(option, given, known)
    num = _whole(given, option, "num", None, least=1)
    require_within("pictures", num, option)
    if (own := given.get("plane")) is not None:
        if own not in PLANES:
            raise unknown_name("plane", str(own), PLANES)
        plane = str(own)
    first, last = (_whole(given, option, key, end) for key, end in (("first", 0), ("last", -1)))
    return num, first, last, plane


def _require_keys(option: str, given: Mapping[str, object], known: Sequence[str]) -> None:
    for key in given:
        if key not in known:
            raise unknown_name(f"key of {option}", str(key), known)


def _whole(
    given: Mapping[str, object],
    option: str,
    key: str,
    default: int | None,
    *,
    least: int | None = None,
) -> int:
    value = given.get(key, default)
    if not _is_whole(value) or (least is not None and cast(int, value) < least):
        expected = "a whole number" if least is None else f"a whole number of at least {least}"
        found = "missing" if value is None else repr(value)
        raise ValueError(f"{key} of {option} is {found}; expected {expected}.")
    return cast(int, value)


def _is_whole(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _name_of(image: object) -> str:
    return str(image) if isinstance(image, Path) else "The image"


def _kind_of(image: ImageLike) -> ImageKind | None:
    if isinstance(image, Path):
        with image.open("rb") as file:
            return kind_of_file(image, file.read(HEADER_BYTES))
    if isinstance(image, bytes):
        return kind_of_bytes(image[:HEADER_BYTES])
    return kind_of_object(image)
