"""Pictures that are not DICOM or NIfTI: 16 bits, CMYK, animations, limits, windows."""

import io

import numpy as np
import pytest
from PIL import Image

from moellava.images import is_image_file, load_image, to_pil


def grey16(side=64) -> np.ndarray:
    return np.linspace(0, 65535, side * side).round().astype(np.uint16).reshape(side, side)


@pytest.mark.parametrize("name", ["a.png", "a.tif"])
def test_sixteen_bit_files_are_scaled_not_clamped(tmp_path, name):
    values = grey16()
    Image.fromarray(values).save(tmp_path / name)
    picture = np.asarray(load_image(tmp_path / name))
    assert picture.shape == (64, 64, 3)
    assert np.array_equal(picture[..., 0], np.rint(values / 65535 * 255))


@pytest.mark.parametrize("window", [(2048, 4096), (1000.0, 200.0)])
def test_a_window_shows_twelve_bits_in_a_sixteen_bit_file(tmp_path, window):
    values = np.resize(np.arange(4096, dtype=np.uint16), (64, 64))
    Image.fromarray(values).save(tmp_path / "a.png")
    center, width = window
    expected = np.rint(np.clip((values - (center - width / 2)) / width, 0, 1) * 255)
    assert np.array_equal(
        np.asarray(load_image(tmp_path / "a.png", window=window))[..., 1], expected
    )
    assert np.array_equal(np.asarray(load_image(values, window=window))[..., 1], expected)


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


def test_a_huge_image_is_refused_by_its_header(tmp_path, monkeypatch):
    Image.new("1", (4000, 3000)).save(tmp_path / "a.png")
    monkeypatch.setattr(Image.Image, "load", lambda self: pytest.fail("it was decoded"))
    with pytest.raises(
        ValueError, match=r"a\.png is 4000x3000 pixels, beyond the limit of 10,000,000"
    ):
        to_pil(tmp_path / "a.png", max_pixels=10_000_000)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1_000_000)
    with pytest.raises(
        ValueError, match=r"a\.png is larger than Pillow's limit: .*MAX_IMAGE_PIXELS"
    ):
        to_pil(tmp_path / "a.png")


def test_encoded_bytes_and_the_hubs_undecoded_images_are_read(tmp_path):
    values = grey16()
    buffer = io.BytesIO()
    Image.fromarray(values).save(buffer, "PNG")
    (tmp_path / "a.png").write_bytes(buffer.getvalue())
    expected = np.asarray(load_image(tmp_path / "a.png"))
    for source in (
        buffer.getvalue(),
        {"bytes": buffer.getvalue(), "path": None},
        {"bytes": None, "path": str(tmp_path / "a.png")},
    ):
        assert np.array_equal(np.asarray(load_image(source)), expected)
    with pytest.raises(ValueError, match="The encoded image cannot be read as an image"):
        to_pil(b"no image")


@pytest.mark.parametrize(
    ("view", "message"),
    [
        ({"window": "lnug"}, r"Unknown window 'lnug'. Did you mean 'lung'"),
        ({"window": (40, 0)}, "width of at least 1"),
        ({"window": 1.5}, "expected a preset"),
        ({"frame": "girl"}, "expected a number, 'grid'"),
        ({"window": "soft"}, "The image is in colour"),
        ({"window": 0}, "The image is in colour"),
    ],
)
def test_views_that_mean_nothing_are_refused(view, message):
    with pytest.raises(ValueError, match=message):
        to_pil(Image.new("RGB", (4, 4)), **view)


def test_image_files_are_known_by_suffix_or_as_dicom_by_content(tmp_path):
    from pydicom.data import get_testdata_file

    content = get_testdata_file("CT_small.dcm", read=False, download=False)
    with open(content, "rb") as file:
        (tmp_path / "IM0001").write_bytes(file.read())
    for name in ("a.PNG", "b.nii.gz", "c.dcm"):
        (tmp_path / name).touch()
    (tmp_path / "notes.txt").write_bytes((tmp_path / "IM0001").read_bytes())
    (tmp_path / "README").write_text("x")
    assert sorted(path.name for path in tmp_path.iterdir() if is_image_file(path)) == [
        *("IM0001", "a.PNG", "b.nii.gz", "c.dcm"),
    ]
