"""Folders as scanners and archives leave them."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from moellava.images.folder import find_images

pydicom = pytest.importorskip("pydicom")


def write_dicom(path: Path, *, with_pixels: bool) -> None:
    dataset = pydicom.Dataset()
    dataset.file_meta = pydicom.dataset.FileMetaDataset()
    dataset.file_meta.TransferSyntaxUID = pydicom.uid.ExplicitVRLittleEndian
    dataset.file_meta.MediaStorageSOPClassUID = pydicom.uid.SecondaryCaptureImageStorage
    dataset.file_meta.MediaStorageSOPInstanceUID = pydicom.uid.generate_uid()
    dataset.SOPClassUID = dataset.file_meta.MediaStorageSOPClassUID
    dataset.PatientName = "Name^Of"
    if with_pixels:
        dataset.set_pixel_data(np.zeros((4, 4), np.uint8), "MONOCHROME2", 8)
    dataset.save_as(path, enforce_file_format=True)


def test_reports_among_images_are_told_apart_by_content(tmp_path):
    (tmp_path / "sub").mkdir()
    write_dicom(tmp_path / "sub" / "image.dcm", with_pixels=True)
    write_dicom(tmp_path / "report.dcm", with_pixels=False)
    write_dicom(tmp_path / "sub" / "1.2.3", with_pixels=False)
    (tmp_path / "broken.dcm").write_bytes(bytes(128) + b"DICM" + b"\xff" * 9)
    Image.new("L", (3, 3)).save(tmp_path / "a.png")
    (tmp_path / "notes.txt").write_text("no image")
    found = find_images(tmp_path)
    names = [path.relative_to(tmp_path).as_posix() for path in found.images]
    assert names == ["a.png", "broken.dcm", "sub/image.dcm"]
    assert [path.name for path in found.without_pixels] == ["report.dcm", "1.2.3"]
