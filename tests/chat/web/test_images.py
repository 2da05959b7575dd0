"""What is chosen on the page, against `moellava.images` and the image processor."""

import numpy as np
import pydicom
import pytest
from PIL import Image
from pydicom.uid import generate_uid

from moellava.chat.web.images import CUSTOM, OWN, as_seen, read_uploads
from moellava.images import WINDOWS, to_pil

from .conftest import CT

PIXELS = 64_000_000


def read_one(*paths):
    (image,), errors = read_uploads(paths, PIXELS)
    assert not errors
    return image


def pixels(picture):
    return np.asarray(picture)


@pytest.fixture
def series(tmp_path):
    """Three slices, in files whose names run against their positions."""
    paths, uid = [], generate_uid()
    for place in range(3):
        dataset = pydicom.dcmread(CT)
        dataset.SeriesInstanceUID = uid
        dataset.ImagePositionPatient = [0, 0, place * 5.0]
        dataset.ImageOrientationPatient = [1, 0, 0, 0, 1, 0]
        dataset.PixelData = (dataset.pixel_array + 100 * place).astype(np.int16).tobytes()
        paths.append(tmp_path / f"{9 - place}.dcm")
        dataset.save_as(paths[-1])
    return paths


def test_a_slice_of_a_series_is_the_file_at_its_place(series):
    image = read_one(*series[::-1])
    assert image.num_frames == 3
    assert image.name == "9.dcm (3 slices)"
    assert image.frame == 1
    for place, path in enumerate(series):
        image.choose_frame(place)
        assert np.array_equal(pixels(image.picture()), pixels(to_pil(path)))
    image.choose_frame(99)
    assert image.frame == 2


def test_a_volume_of_2000_slices_shows_each_of_them(volume):
    image = read_one(volume)
    assert image.planes == ("axial", "coronal", "sagittal")
    assert (image.num_frames, image.frame) == (2000, 1000)
    image.choose_greys(1000, 2000)
    image.choose_frame(1999)
    assert pixels(image.picture()).min() == 255
    image.choose_plane("coronal")
    assert (image.num_frames, image.frame) == (9, 4)


@pytest.mark.parametrize("name", WINDOWS)
def test_a_preset_shows_what_the_library_shows(name):
    image = read_one(CT)
    image.choose_window(name)
    assert np.array_equal(pixels(image.picture()), pixels(to_pil(CT, window=name)))
    assert image.center_and_width == WINDOWS[name]


def test_numbers_begin_at_the_window_that_is_shown():
    image = read_one(CT)
    own = pixels(image.picture())
    assert image.window_name == OWN
    image.choose_window("bone")
    image.choose_window(CUSTOM)
    assert image.view["window"] == WINDOWS["bone"]
    image.choose_greys(-600.0, 0.2)
    assert image.view["window"] == (-600, 1)
    image.choose_window(OWN)
    assert np.array_equal(pixels(image.picture()), own)


def test_only_ct_has_presets_and_colour_no_window(scan, tmp_path):
    assert read_one(CT).windows == (OWN, *WINDOWS, CUSTOM)
    mr = read_one(CT.parent / "MR_small.dcm")
    assert mr.windows == (OWN, CUSTOM)
    copy = tmp_path / "a.png"
    Image.open(scan).save(copy)
    assert read_one(copy).windows == ()


def test_an_image_waits_until_it_is_sent_and_again_once_its_view_has_changed():
    image = read_one(CT)
    assert image.is_waiting
    image.sent = image.view.copy()
    assert not image.is_waiting
    image.choose_window("lung")
    assert image.is_waiting
    image.choose_window(OWN)
    assert not image.is_waiting


class TestWhatTheModelSees:
    def test_a_picture_of_the_right_size_is_seen_as_it_is(self, loaded):
        levels = np.random.default_rng(0).integers(0, 256, (224, 224, 3), dtype=np.uint8)
        assert np.array_equal(pixels(as_seen(loaded, Image.fromarray(levels))), levels)

    def test_what_the_processor_cuts_off_is_not_shown(self, loaded):
        levels = np.random.default_rng(0).integers(0, 256, (224, 300, 3), dtype=np.uint8)
        seen = pixels(as_seen(loaded, Image.fromarray(levels)))
        assert np.array_equal(seen, levels[:, 38:262])


class TestWrongFiles:
    def refused(self, path, max_pixels=PIXELS):
        images, (error,) = read_uploads([path], max_pixels)
        assert not images
        assert str(path.parent) not in error
        assert path.name in error
        return error

    def test_a_file_of_another_kind(self, tmp_path):
        path = tmp_path / "letter.docx"
        path.write_bytes(b"PK\x03\x04" + bytes(400))
        assert "cannot be read as an image" in self.refused(path)

    def test_an_encrypted_dicom_file(self, tmp_path):
        """The picture among the encrypted attributes (PS3.15 E.1), or an envelope around all."""
        dataset = pydicom.dcmread(CT)
        secret = b"\x30\x82\x01\x00" + np.random.default_rng(0).bytes(500)  # a CMS envelope
        del dataset.PixelData, dataset.Rows, dataset.Columns
        item = pydicom.Dataset()
        item.EncryptedContent = secret
        dataset.EncryptedAttributesSequence = [item]
        path = tmp_path / "encrypted.dcm"
        dataset.save_as(path)
        assert "without a picture" in self.refused(path)
        path.write_bytes(secret)
        assert "without a picture" in self.refused(path)

    def test_a_video(self, tmp_path):
        dataset = pydicom.dcmread(CT)
        dataset.file_meta.TransferSyntaxUID = pydicom.uid.MPEG4HP41
        dataset.PixelData = pydicom.encaps.encapsulate([bytes(1000)])
        dataset["PixelData"].is_undefined_length = True
        path = tmp_path / "video.dcm"
        dataset.save_as(path)
        assert "MPEG-4" in self.refused(path)

    def test_300_megapixels(self, tmp_path):
        path = tmp_path / "slide.png"
        Image.new("1", (30_000, 10_000)).save(path)
        assert "300000000 pixels" in self.refused(path)
        Image.new("1", (10_000, 8_000)).save(path)
        assert "beyond the limit of 64,000,000" in self.refused(path)

    def test_a_bad_file_does_not_keep_the_good_ones_out(self, tmp_path):
        path = tmp_path / "bad.png"
        path.write_bytes(b"\x89PNG")
        images, errors = read_uploads([path, CT], PIXELS)
        assert len(images) == len(errors) == 1
