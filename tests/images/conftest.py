"""DICOM files built for a test: written by pydicom, so that the readers meet real files."""

from pathlib import Path

import numpy as np
import pydicom
import pytest
from pydicom.data import get_testdata_file
from pydicom.uid import ExplicitVRLittleEndian, generate_uid

from moellava.images import View
from moellava.images.dicom import decode_dicom

CT_IMAGE, ENHANCED_CT, SECONDARY = (
    "1.2.840.10008.5.1.4.1.1.2",
    "1.2.840.10008.5.1.4.1.1.2.1",
    "1.2.840.10008.5.1.4.1.1.7",
)


def dicom_dataset(pixels: np.ndarray, *, sop_class: str = SECONDARY, **elements) -> pydicom.Dataset:
    """A dataset with pixels (H, W) or (H, W, 3), for several frames with one axis more."""
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


def ramp(dtype=np.int16, low=-1024, high=3071, side=300) -> np.ndarray:
    """Every value from low to high, more pixels than a table has entries."""
    return np.resize(np.arange(low, high + 1), (side, side)).astype(dtype)


def shipped(name: str) -> str:
    """A file that comes with pydicom."""
    return str(get_testdata_file(name, download=False))


def decoded(path: Path | str, **view) -> np.ndarray:
    return np.asarray(decode_dicom(Path(path), View(**view), str(path)))


@pytest.fixture
def save_dicom(tmp_path):
    def save(pixels: np.ndarray, name: str = "scan.dcm", **elements) -> Path:
        path = tmp_path / name
        dicom_dataset(pixels, **elements).save_as(path, enforce_file_format=True)
        return path

    return save


def write_ct(
    folder: Path, volume: np.ndarray, *, orientation=(1, 0, 0, 0, 1, 0), spacing=2.5, **elements
) -> list[Path]:
    """A CT series (S, H, W) int16, one file per slice along the normal; names in another order."""
    normal = np.cross(orientation[:3], orientation[3:])
    series, study = generate_uid(), generate_uid()
    folder.mkdir(parents=True, exist_ok=True)
    paths = []
    for place, pixels in enumerate(volume):
        dataset = dicom_dataset(pixels, sop_class=CT_IMAGE, Modality="CT")
        dataset.SeriesInstanceUID, dataset.StudyInstanceUID = series, study
        dataset.FrameOfReferenceUID = study
        dataset.RescaleSlope, dataset.RescaleIntercept = 1, -1024
        dataset.ImageOrientationPatient, dataset.PixelSpacing = list(orientation), [1, 1]
        dataset.ImagePositionPatient = [float(x) for x in place * spacing * normal]
        for name, value in elements.items():
            setattr(dataset, name, value)
        # 7 and the number of slices have no common divisor: each name comes once.
        path = folder / f"{place * 7 % 101:03d}.dcm"
        dataset.save_as(path, enforce_file_format=True)
        paths.append(path)
    return paths


@pytest.fixture(scope="module")
def volume() -> np.ndarray:
    """(S, H, W) int16; no two slices are alike."""
    return np.random.default_rng(0).integers(0, 3000, (12, 9, 11)).astype(np.int16)
