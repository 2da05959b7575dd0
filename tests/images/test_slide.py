"""Regions and tissue of a whole-slide image, against OpenSlide's own reading."""

import sys

import numpy as np
import openslide
import pytest
import tifffile
from skimage import data

from moellava.images import image_key, image_parts, to_pil
from moellava.images.reading import load_image
from moellava.storage.limits import LIMITS

from .conftest import shipped

TISSUE = (1024, 512)  # x, y of the stained square of 512 pixels


def write_slide(path, levels=3, tile=(256, 256)):
    """A pyramid of glass, 3072 x 2048, with real stained tissue in one place."""
    glass = np.full((2048, 3072, 3), 245, np.uint8)
    x, y = TISSUE
    glass[y : y + 512, x : x + 512] = data.immunohistochemistry()
    with tifffile.TiffWriter(path) as file:
        for level in range(levels):
            shown = glass[:: 2**level, :: 2**level]
            file.write(shown, tile=tile, photometric="rgb", subfiletype=int(level > 0))
    return path


@pytest.fixture(scope="module")
def slide(tmp_path_factory):
    return write_slide(tmp_path_factory.mktemp("slides") / "slide.tif")


@pytest.mark.parametrize(
    ("region", "level"), [((1000, 500, 300, 200), 0), ((0, 0, 768, 512), 2), ((512, 4, 9, 700), 1)]
)
def test_a_region_is_what_openslide_reads(slide, region, level):
    (part,) = image_parts(slide, slide={"region": list(region), "level": level})
    x, y, *size = region
    with openslide.OpenSlide(slide) as opened:
        expected = np.asarray(opened.read_region((x, y), level, tuple(size)))[..., :3]
    assert np.array_equal(to_pil(part), expected)
    assert part.place == ""
    assert image_key(part).endswith(f"#region={','.join(map(str, (*region, level)))}")


def test_tiles_are_where_the_tissue_is(slide):
    overview, *tiles = image_parts(slide, slide={"max_tiles": 9, "side": 256})
    assert overview.place == "overview"
    assert load_image(overview).size == (1536, 1024)  # the smallest level of 1024 pixels or more
    x, y = TISSUE
    corners = [(x, y), (x + 256, y), (x, y + 256), (x + 256, y + 256)]  # as one reads
    assert [tile.region[:2] for tile in tiles] == corners
    assert [tile.place for tile in tiles] == [f"tile {at} of 4" for at in (1, 2, 3, 4)]
    stained = data.immunohistochemistry()
    assert np.array_equal(to_pil(tiles[1]), stained[:256, 256:])


def test_the_tiles_with_the_most_tissue_are_taken(slide):
    options = {"overview": False, "level": 1, "side": 200}
    tiles = image_parts(slide, slide={"max_tiles": 12, **options})
    shares = {tile.region: stained_share(tile) for tile in tiles}
    (best,) = image_parts(slide, slide={"max_tiles": 1, **options})
    assert shares[best.region] == pytest.approx(max(shares.values()), abs=0.02)
    assert all(share > 0.05 for share in shares.values())
    assert [*shares] == sorted(shares, key=lambda region: (region.y, region.x))
    assert len(tiles) < 12  # most of the slide is glass


def stained_share(tile):
    return (np.asarray(to_pil(tile).convert("HSV"))[..., 1] >= 25).mean()


def test_only_the_overview_is_read_to_choose(tmp_path, monkeypatch):
    path = write_slide(tmp_path / "another.tif")
    read = []
    plain = openslide.OpenSlide.read_region
    monkeypatch.setattr(
        openslide.OpenSlide,
        "read_region",
        lambda slide, corner, level, size: (
            read.append((level, size)) or plain(slide, corner, level, size)
        ),
    )
    parts = image_parts(path, slide={"max_tiles": 2})
    assert read == [(1, (1536, 1024))]
    image_parts(path, slide={"max_tiles": 2})
    assert len(read) == 1  # the choice is kept
    to_pil(parts[1])
    assert read[1:] == [(0, (512, 512))]


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"region": [0, 0, 10, 10], "level": 3}, "has no level 3: it has 3, 0 to 2"),
        ({"region": [3000, 0, 100, 10]}, "is 3072x2048 pixels; the region from .* ends beyond it"),
        ({"region": [-1, 0, 10, 10]}, "ends beyond it"),
        ({"region": [0, 0, 0, 10]}, "is 0x10 pixels; expected at least 1x1"),
        (
            {"region": [0, 0, 10]},
            r"slide's region is \[0, 0, 10\]; expected \[x, y, ",
        ),
        ({"region": [0, 0, 9, 9], "side": 64}, "Unknown key of slide 'side'"),
        ({"max_tiles": 0}, "max_tiles of slide is 0; expected a whole number of at least 1"),
        (
            {"max_tiles": 3, "side": 1024, "level": 2},
            "Level 2 of .* is 768x512 pixels",
        ),
        ({"max_tiles": 3, "overview": 1}, "slide's overview is 1; expected true or false"),
        ({}, "max_tiles of slide is missing"),
        (5, "slide is 5; expected a mapping"),
    ],
)
def test_what_a_slide_does_not_have_is_said(slide, given, message):
    with pytest.raises(ValueError, match=message):
        image_parts(slide, slide=given)


def test_glass_has_no_tiles(tmp_path):
    with tifffile.TiffWriter(tmp_path / "glass.tif") as file:
        file.write(np.full((1024, 1024, 3), 240, np.uint8), tile=(256, 256), photometric="rgb")
    with pytest.raises(ValueError, match="has no tile of which 10% is tissue"):
        image_parts(tmp_path / "glass.tif", slide={"max_tiles": 3})


def test_a_slide_without_levels_has_no_overview_but_regions(tmp_path, monkeypatch):
    path = write_slide(tmp_path / "flat.tif", levels=1)
    with pytest.raises(ValueError, match="no level small enough for an overview: its 1 are 3072x"):
        image_parts(path, slide={"max_tiles": 3}, max_pixels=1_000_000)
    (part,) = image_parts(path, slide={"region": [1024, 512, 64, 64]}, max_pixels=1_000_000)
    assert to_pil(part).size == (64, 64)
    monkeypatch.setitem(LIMITS, "frame", 1_000_000)
    with pytest.raises(ValueError, match="no level small enough"):
        image_parts(path, slide={"max_tiles": 4})


def test_the_missing_extra_is_named(slide, monkeypatch):
    monkeypatch.setitem(sys.modules, "openslide", None)
    with pytest.raises(ImportError, match=r"slide\.tif is a whole-slide .*'moellava\[wsi\]'"):
        image_parts(slide, slide={"max_tiles": 5})


def test_what_is_no_slide_is_named(tmp_path):
    (tmp_path / "a.png").write_bytes(b"\x89PNG")
    with pytest.raises(ValueError, match=r"a\.png is not a whole-slide image that OpenSlide reads"):
        image_parts(tmp_path / "a.png", slide={"max_tiles": 3})
    with pytest.raises(ValueError, match="is not a whole-slide image"):
        image_parts(shipped("CT_small.dcm"), slide={"region": [0, 0, 5, 5]})
    with pytest.raises(ValueError, match="is not a file; whole-slide images are read from files"):
        image_parts(b"II*\0", slide={"max_tiles": 3})
