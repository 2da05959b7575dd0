"""What can be chosen about a file, against what the decoders then accept."""

from pathlib import Path

import numpy as np
import pydicom
import pytest
from PIL import Image
from pydicom.data import get_testdata_file

from moellava.images import describe_image, to_pil

from .conftest import CT_IMAGE, dicom_dataset
from .test_nifti import save


def shipped(name):
    return Path(get_testdata_file(name, download=False))


def test_the_greys_of_a_ct_are_those_of_pydicom():
    path = shipped("CT_small.dcm")
    dataset = pydicom.dcmread(path)
    values = pydicom.pixels.apply_modality_lut(dataset.pixel_array, dataset)
    info = describe_image(path)
    assert info.grey_range == (values.min(), values.max())
    assert info.is_ct
    assert info.num_frames == {"": 1}
    assert info.planes == ()


def test_the_window_is_the_one_that_is_shown():
    path = shipped("MR_small.dcm")
    info = describe_image(path)
    assert not info.is_ct
    assert info.window == (600, 1600)


def test_padding_is_not_a_grey_value(tmp_path):
    pixels = np.arange(100, 116, dtype=np.int16).reshape(4, 4)
    pixels[0, 0] = -2000
    dataset = dicom_dataset(pixels, sop_class=CT_IMAGE, Modality="CT", PixelPaddingValue=-2000)
    dataset.PixelRepresentation = 1
    path = tmp_path / "a.dcm"
    dataset.save_as(path, enforce_file_format=True)
    assert describe_image(path).grey_range == (101, 115)


def test_colour_has_no_window():
    path = shipped("examples_palette.dcm")
    assert describe_image(path).grey_range is None
    assert describe_image(path).window is None


def test_every_slice_that_is_named_can_be_shown(tmp_path):
    values = np.zeros((3, 4, 2000), np.int16)
    values[1, 1] = np.arange(2000) - 5
    path = save(tmp_path / "a.nii.gz", values, affine=np.diag([1, 1, -1, 1]))
    info = describe_image(path)
    assert info.num_frames == {"axial": 2000, "sagittal": 3, "coronal": 4}
    assert info.grey_range == (0, 994)  # of the middle slice
    for plane, count in info.num_frames.items():
        to_pil(path, plane=plane, frame=count - 1)
        with pytest.raises(ValueError, match=f"has no frame {count}"):
            to_pil(path, plane=plane, frame=count)


def test_frames_of_an_animation(tmp_path):
    path = tmp_path / "a.gif"
    frames = [Image.new("L", (8, 8), grey) for grey in (0, 100, 200)]
    frames[0].save(path, save_all=True, append_images=frames[1:])
    assert describe_image(path).num_frames == {"": 3}


@pytest.mark.parametrize(
    ("name", "content"),
    [("a.png", b"x" * 300), ("a.dcm", b"\0" * 128 + b"DICM" + b"x" * 99), ("a.nii", b"x" * 400)],
)
def test_a_broken_file_is_named(tmp_path, name, content):
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(ValueError, match=name):
        describe_image(path)


def test_a_picture_beyond_the_limit_is_not_decoded():
    with pytest.raises(ValueError, match="128x128 pixels, beyond the limit of 100"):
        describe_image(shipped("CT_small.dcm"), max_pixels=100)
