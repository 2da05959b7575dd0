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
