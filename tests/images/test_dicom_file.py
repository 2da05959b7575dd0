"""How a DICOM file is read: whole if small, by the frame if large, never the patient's elements."""

import numpy as np
import pydicom
import pytest

from moellava.images import to_pil
from moellava.images.dicom_error import DicomError
from moellava.images.dicom_file import read_dicom

from .conftest import decoded, ramp, shipped


@pytest.fixture
def every_file_is_large(monkeypatch):
    monkeypatch.setattr("moellava.images.dicom_file.READ_WHOLE", 0)


def test_a_large_file_is_read_by_the_frame(save_dicom, monkeypatch):
    frames = np.random.default_rng(0).integers(0, 4096, (5, 40, 50), dtype=np.uint16)
    path = save_dicom(frames, BitsStored=12, WindowCenter=2000, WindowWidth=3000)
    small = decoded(path, frame=3)
    monkeypatch.setattr("moellava.images.dicom_file.READ_WHOLE", 100)
    assert "PixelData" not in read_dicom(path, "x").header
    assert np.array_equal(decoded(path, frame=3), small)
    assert np.array_equal(
        decoded(shipped("image_dfl.dcm")), pydicom.dcmread(shipped("image_dfl.dcm")).pixel_array
    )


@pytest.mark.parametrize(
    "syntax", [pydicom.uid.ExplicitVRLittleEndian, pydicom.uid.ImplicitVRLittleEndian]
)
@pytest.mark.parametrize("dtype", [np.uint16, np.int16])
def test_a_large_uncompressed_file_is_mapped_where_its_pixels_are(
    save_dicom, every_file_is_large, syntax, dtype
):
    frames = np.random.default_rng(0).integers(-500, 3000, (3, 40, 50))
    frames = frames.clip(np.iinfo(dtype).min).astype(dtype)
    path = save_dicom(frames, WindowCenter=1000, WindowWidth=3000)
    dataset = pydicom.dcmread(path)
    dataset.file_meta.TransferSyntaxUID = syntax
    dataset.private_block(0x7FE1, "moellava", create=True).add_new(1, "LO", "behind the pixels")
    dataset.save_as(path, implicit_vr=syntax.is_implicit_VR, little_endian=True)
    expected = pydicom.dcmread(path).pixel_array
    file = read_dicom(path, "x")
    for frame in range(3):
        assert np.array_equal(file.mapped_values(frame), expected[frame])
        assert np.array_equal(file.decoded_values(frame), expected[frame])


def test_a_mapped_file_gives_the_picture_of_one_read_whole(save_dicom, monkeypatch):
    path = save_dicom(ramp(), WindowCenter=1000, WindowWidth=3000)
    whole = decoded(path)
    monkeypatch.setattr("moellava.images.dicom_file.READ_WHOLE", 0)
    assert read_dicom(path, "x").mapped_values(0) is not None
    assert np.array_equal(decoded(path), whole)


def test_a_large_file_cut_short_says_so(save_dicom, every_file_is_large):
    path = save_dicom(ramp())
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(DicomError, match=r"scan.dcm is cut short: .* byte [\d,]+, and it has"):
        to_pil(path)


def test_the_patient_is_never_read(save_dicom):
    header = read_dicom(save_dicom(ramp()), "x").header
    assert not [element for element in header if element.tag.group in (0x0010, 0x0020)]
    assert "Secret" not in str(header)
