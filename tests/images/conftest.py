"""DICOM files built for a test: pydicom writes them, so that the readers under test meet real files."""

from pathlib import Path

import numpy as np
import pydicom
import pytest
from pydicom.uid import ExplicitVRLittleEndian, generate_uid

CT_IMAGE, ENHANCED_CT, SECONDARY = (
    "1.2.840.10008.5.1.4.1.1.2",
    "1.2.840.10008.5.1.4.1.1.2.1",
    "1.2.840.10008.5.1.4.1.1.7",
)


def dicom_dataset(pixels: np.ndarray, *, sop_class: str = SECONDARY, **elements) -> pydicom.Dataset:
    """A dataset with the pixels (H, W), (H, W, 3) or, for several frames, one axis more, and the given elements."""
    meta = pydicom.dataset.FileMetaDataset()
    meta.TransferSyntaxUID = ExplicitVRLittleEndian
    meta.MediaStorageSOPClassUID, meta.MediaStorageSOPInstanceUID = sop_class, generate_uid()
    dataset = pydicom.Dataset()
    dataset.file_meta = meta
    dataset.SOPClassUID, dataset.SOPInstanceUID = sop_class, meta.MediaStorageSOPInstanceUID
    dataset.StudyInstanceUID, dataset.SeriesInstanceUID = generate_uid(), generate_uid()
    dataset.PatientName, dataset.PatientID, dataset.PatientBirthDate = (
        "Secret^Patient",
        "MRN-4711",
        "19570304",
    )
    dataset.PatientSex, dataset.StudyID, dataset.StudyDate, dataset.StudyTime = (
        "F",
        "ST-99",
        "20260101",
        "120000",
    )
    dataset.AccessionNumber, dataset.ReferringPhysicianName, dataset.SeriesNumber = (
        "ACC-1",
        "House^Gregory",
        1,
    )
    dataset.Modality, dataset.InstanceNumber = elements.pop("Modality", "OT"), 1
    is_colour = pixels.shape[-1] == 3
    dataset.SamplesPerPixel = 3 if is_colour else 1
    dataset.PhotometricInterpretation = elements.pop(
        "PhotometricInterpretation", "RGB" if is_colour else "MONOCHROME2"
    )
    if is_colour:
        dataset.PlanarConfiguration = 0
    frames = pixels.ndim - 2 - is_colour
    dataset.Rows, dataset.Columns = pixels.shape[frames : frames + 2]
    if frames:
        dataset.NumberOfFrames = pixels.shape[0]
    dataset.BitsAllocated = 8 * pixels.dtype.itemsize
    dataset.BitsStored = elements.pop("BitsStored", dataset.BitsAllocated)
    dataset.HighBit = dataset.BitsStored - 1
    dataset.PixelRepresentation = int(pixels.dtype.kind == "i")
    dataset.PixelData = pixels.tobytes()
    for keyword, value in elements.items():
        setattr(dataset, keyword, value)
    return dataset


@pytest.fixture
def save_dicom(tmp_path):
    def save(pixels: np.ndarray, name: str = "scan.dcm", **elements) -> Path:
        path = tmp_path / name
        dicom_dataset(pixels, **elements).save_as(path, enforce_file_format=True)
        return path

    return save
