"""A whole-slide image → a region of it, or the tiles that show tissue, through OpenSlide.

Only the regions that are asked for are read, and for the choice of tiles the overview.
"""

import functools
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image

from moellava.images.image_like import SlideRegion
from moellava.images.optional import load_optional
from moellava.images.view import View
from moellava.storage.limits import require_within

if TYPE_CHECKING:
    from openslide import OpenSlide

# The longer side of an overview has at least so many pixels, if the slide has them.
OVERVIEW_SIDE = 1024
# A pixel shows tissue if its saturation (HSV, 0 to 255) is at least this: glass is grey, stains
# are not. A tile shows tissue if so many of its pixels do.
TISSUE_SATURATION = 25
TISSUE_SHARE = 0.1


def read_region(path: object, region: SlideRegion, max_pixels: int, name: str) -> Image.Image:
    """An RGB picture of a region; what was not scanned has the slide's background colour.

    Raises:
        ImportError: openslide-python is not installed.
        ValueError: not a slide, no such level, a region beyond its edges, too many pixels.
    """
    with _opened(path, name) as slide:
        _require_region(slide, region, max_pixels, name)
        return _region(slide, region)


def check_region(path: object, region: SlideRegion, max_pixels: int, name: str) -> None:
    """Raise the errors of `read_region` without reading pixels."""
    with _opened(path, name) as slide:
        _require_region(slide, region, max_pixels, name)


def tissue_tiles(
    path: object, *, most: int, level: int, side: int, max_pixels: int, name: str
) -> tuple[SlideRegion, tuple[SlideRegion, ...]]:
    """The overview of a slide, and the tiles with the most tissue, from left to right and down.

    The level is cut into squares from its upper left corner; what is left over at the right and
    lower edges is in no tile. Tissue is looked for in the overview alone: the smallest level whose
    longer side has `OVERVIEW_SIDE` pixels. A tile is taken if `TISSUE_SHARE` of it is tissue, those
    with the most first, and of equal ones the upper left.

    Args:
        most: tiles that are taken at most; a choice is kept until the file changes.
        level: of the tiles.
        side: of a tile, in pixels of that level.

    Raises:
        ImportError: openslide-python is not installed.
        ValueError: not a slide, no such level, no level that is small enough for an overview, no
            tissue.
    """
    changed = Path(path).stat().st_mtime_ns if isinstance(path, Path) and path.exists() else 0
    return _tissue_tiles(path, changed, most, level, side, max_pixels, name)


@functools.lru_cache(maxsize=256)
def _tissue_tiles(
    path: object, changed: int, most: int, level: int, side: int, max_pixels: int, name: str
) -> tuple[SlideRegion, tuple[SlideRegion, ...]]:
    with _opened(path, name) as slide:
        _require_level(slide, level, name)
        whole = _overview(slide, max_pixels, name)
        saturation = np.asarray(_region(slide, whole).convert("HSV"))[..., 1]
        width, height = slide.level_dimensions[level]
        scale = slide.level_downsamples[level]
    if width < side or height < side:
        raise ValueError(
            f"Level {level} of {name} is {width}x{height} pixels, smaller than a tile of {side}. "
            "Give a smaller side, or a finer level."
        )
    columns, rows = width // side, height // side
    is_tissue = Image.fromarray((saturation >= TISSUE_SATURATION).astype(np.float32))
    covered = (
        columns * side * whole.width / width,
        rows * side * whole.height / height,
    )
    # (rows, columns): a box filter takes the mean over each tile.
    shares = np.asarray(is_tissue.resize((columns, rows), Image.Resampling.BOX, (0, 0, *covered)))
    order = np.argsort(-shares, axis=None, kind="stable")[:most]
    chosen = sorted(int(place) for place in order if shares.flat[place] >= TISSUE_SHARE)
    if not chosen:
        raise ValueError(
            f"{name} has no tile of which {TISSUE_SHARE:.0%} is tissue (saturation "
            f"{TISSUE_SATURATION} of 255 or more). Give a region."
        )
    places = (divmod(place, columns) for place in chosen)
    corners = [(int(column * side * scale), int(row * side * scale)) for row, column in places]
    return whole, tuple(SlideRegion(x, y, side, side, level) for x, y in corners)


@contextmanager
def _opened(path: object, name: str) -> "Iterator[OpenSlide]":
    openslide = load_optional("openslide", f"{name} is a whole-slide image", extra="wsi")
    if not isinstance(path, str | Path):
        raise ValueError(f"{name} is not a file; whole-slide images are read from files.")
    if not Path(path).exists():
        raise FileNotFoundError(f"The image {path} does not exist.")
    if openslide.OpenSlide.detect_format(path) is None:
        raise ValueError(
            f"{name} is not a whole-slide image that OpenSlide reads. Leave slide out for others."
        )
    with openslide.OpenSlide(path) as slide:
        yield slide


def _region(slide: "OpenSlide", region: SlideRegion) -> Image.Image:
    corner, size = (region.x, region.y), (region.width, region.height)
    seen: Image.Image = slide.read_region(corner, region.level, size)  # RGBA
    colour = slide.properties.get("openslide.background-color", "ffffff")
    ground = Image.new("RGBA", seen.size, f"#{colour}")
    return Image.alpha_composite(ground, seen).convert("RGB")


def _overview(slide: "OpenSlide", max_pixels: int, name: str) -> SlideRegion:
    sizes = slide.level_dimensions
    level = next((at for at in reversed(range(len(sizes))) if max(sizes[at]) >= OVERVIEW_SIDE), 0)
    whole = SlideRegion(0, 0, *sizes[level], level)
    try:
        _require_region(slide, whole, max_pixels, name)
    except ValueError as error:
        raise ValueError(
            f"{name} has no level small enough for an overview: its {len(sizes)} are "
            f"{', '.join(f'{width}x{height}' for width, height in sizes)} pixels. Give a region. "
            f"({error})"
        ) from None
    return whole


def _require_level(slide: "OpenSlide", level: int, name: str) -> None:
    if not 0 <= level < slide.level_count:
        raise ValueError(
            f"{name} has no level {level}: it has {slide.level_count}, 0 to "
            f"{slide.level_count - 1}."
        )


def _require_region(slide: "OpenSlide", region: SlideRegion, max_pixels: int, name: str) -> None:
    _require_level(slide, region.level, name)
    View(max_pixels=max_pixels).check_size(region.width, region.height, f"The region of {name}")
    require_within("frame", region.width * region.height * 4, name)
    width, height = slide.dimensions
    scale = slide.level_downsamples[region.level]
    # The last pixel of a level may stand for less than `scale` pixels of level 0.
    right = region.x + (region.width - 1) * scale
    lower = region.y + (region.height - 1) * scale
    if region.x < 0 or region.y < 0 or right >= width or lower >= height:
        raise ValueError(
            f"{name} is {width}x{height} pixels; the region from ({region.x}, {region.y}) with "
            f"{region.width}x{region.height} pixels of level {region.level} ends beyond it. x and "
            "y are pixels of level 0."
        )
