"""What Pillow reads, seen through frame, window and orientation."""

import io

import numpy as np
import pytest
from PIL import Image, ImageOps, PngImagePlugin

from moellava.images import load_image, to_pil


def test_signed_and_float_tiffs_of_hounsfield_values_take_a_preset(tmp_path):
    values = np.resize(np.arange(-1500, 1500), (50, 60))
    expected = np.rint(np.clip((values + 1350) / 1500, 0, 1) * 255)
    for name, stored in (("i.tif", values.astype(np.int32)), ("f.tif", values.astype(np.float32))):
        Image.fromarray(stored).save(tmp_path / name)
        assert np.array_equal(
            np.asarray(load_image(tmp_path / name, window="lung"))[..., 0], expected
        )
        with pytest.raises(ValueError, match=r"expected (16 bits|0 to 1)"):
            load_image(tmp_path / name)


def test_cmyk_jpegs_become_the_rgb_that_pillow_makes(tmp_path):
    from moellava.testing.datasets import picture

    picture(3, mode="CMYK").save(tmp_path / "a.jpg")
    assert np.array_equal(
        np.asarray(load_image(tmp_path / "a.jpg")), Image.open(tmp_path / "a.jpg").convert("RGB")
    )


@pytest.fixture
def animation(tmp_path):
    frames = [Image.new("L", (20, 10), 40 * number) for number in range(5)]
    frames[0].save(tmp_path / "a.gif", save_all=True, append_images=frames[1:])
    frames[0].save(tmp_path / "a.tif", save_all=True, append_images=frames[1:])
    return tmp_path


@pytest.mark.parametrize("name", ["a.gif", "a.tif"])
def test_of_an_animation_the_first_frame_or_the_one_asked_for_is_taken(animation, name):
    assert load_image(animation / name).getextrema()[0] == (0, 0)
    assert load_image(animation / name, frame=3).getextrema()[0] == (120, 120)
    assert load_image(animation / name, frame=-1).getextrema()[0] == (160, 160)
    with pytest.raises(ValueError, match=r"a\.(gif|tif) has no frame 5: it has 5, 0 to 4"):
        load_image(animation / name, frame=5)


def test_a_grid_of_an_animation(animation):
    grid = np.asarray(load_image(animation / "a.gif", frame="grid:4"))[..., 0]
    assert grid.shape == (20, 40)
    assert [grid[0, 0], grid[0, 20], grid[10, 0], grid[10, 20]] == [0, 40, 120, 160]


class TestOrientation:
    @pytest.mark.parametrize("orientation", range(1, 9))
    @pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "TIFF", "MPO"])
    def test_a_picture_stands_as_a_viewer_shows_it(self, tmp_path, kind, orientation):
        pixels = np.zeros((48, 64, 3), np.uint8)
        pixels[:16, :24] = (255, 0, 0)
        exif = Image.Exif()
        exif[0x0112] = orientation
        options = {"save_all": True} if kind == "MPO" else {}
        path = tmp_path / f"a.{kind.lower()}"
        Image.fromarray(pixels).save(path, kind, exif=exif, **options)
        expected = np.asarray(ImageOps.exif_transpose(Image.open(path)).convert("RGB"))
        assert expected.shape[:2] == ((64, 48) if orientation > 4 else (48, 64))
        for source in (path, path.read_bytes()):
            assert np.array_equal(np.asarray(load_image(source)), expected)

    @pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "TIFF", "MPO"])
    def test_a_broken_block_of_exif_does_not_stop_the_reading(self, tmp_path, kind):
        """Whatever byte of it is wrong; the pixels are those of the file, turned or not."""
        exif = Image.Exif()
        exif[0x0112], exif[0x010E] = 6, "words"
        if kind != "TIFF":
            exif[0x8769] = {0x9286: b"more"}
        pixels = np.random.default_rng(0).integers(0, 255, (6, 8, 3), np.uint8)
        options = {"MPO": {"save_all": True}, "TIFF": {}}.get(kind, {})
        Image.fromarray(pixels).save(file := io.BytesIO(), kind, exif=exif, **options)
        data = file.getvalue()
        turned = np.asarray(load_image(data))
        assert turned.shape == (8, 6, 3)
        begin = data.index(b"words") - 60
        # In a TIFF the same block holds what the pixels need.
        places = range(begin, min(begin + 90, len(data)))
        if kind == "TIFF":
            places = range(data.index(b"words"), data.index(b"words") + 1)
        for place in places:
            for value in (0, 255):
                broken = bytearray(data)
                broken[place] = value
                try:
                    plain = np.asarray(Image.open(io.BytesIO(broken)).convert("RGB"))
                except (OSError, SyntaxError, ValueError):
                    continue  # it is more than EXIF that broke
                shown = np.asarray(load_image(bytes(broken)))
                turns = {  # flips and turns that a wrong number may ask for
                    array.tobytes()
                    for flipped in (plain, plain[:, ::-1])
                    for array in (np.rot90(flipped, number) for number in range(4))
                }
                assert shown.tobytes() in turns

    @pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
    def test_a_turn_that_only_xmp_names_is_made(self, kind):
        xmp = b'<x:xmpmeta xmlns:x="adobe:ns:meta/"><r tiff:Orientation="6"/></x:xmpmeta>'
        options = {"xmp": xmp}
        if kind == "PNG":
            options = {"pnginfo": PngImagePlugin.PngInfo()}
            options["pnginfo"].add_itxt("XML:com.adobe.xmp", xmp.decode())
        Image.new("RGB", (8, 6)).save(file := io.BytesIO(), kind, **options)
        assert ImageOps.exif_transpose(Image.open(file)).size == (6, 8)
        assert load_image(file.getvalue()).size == (6, 8)

    def test_a_turned_picture_is_not_turned_again(self, tmp_path):
        exif = Image.Exif()
        exif[0x0112] = 6
        Image.new("RGB", (8, 6)).save(tmp_path / "a.jpg", exif=exif)
        once = to_pil(tmp_path / "a.jpg")
        assert once.size == (6, 8)
        assert to_pil(once).size == (6, 8)
        assert ImageOps.exif_transpose(once).size == (6, 8)
