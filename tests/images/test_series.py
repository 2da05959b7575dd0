"""Stacks of slices among files in any order."""

import os
import random
import shutil

import highdicom
import nibabel
import numpy as np
import pydicom
import pytest
from pydicom.data import get_testdata_file, get_testdata_files
from pydicom.uid import generate_uid

from moellava.images import image_parts, sort_series, to_pil
from moellava.images.series import read_series

from .conftest import CT_IMAGE, dicom_dataset, shipped, write_ct

AXIAL = [1, 0, 0, 0, 1, 0]


def write_slices(folder, series, count, *, orientation=AXIAL, **elements):
    """Files whose names say where their slices lie."""
    normal = np.cross(orientation[:3], orientation[3:])
    paths = []
    for place in range(count):
        dataset = dicom_dataset(np.zeros((4, 4), np.uint16), sop_class=CT_IMAGE, Modality="CT")
        dataset.SeriesInstanceUID = series
        dataset.ImageOrientationPatient = list(orientation)
        dataset.ImagePositionPatient = [float(x) for x in (place - 7.5) * 2.5 * normal]
        dataset.InstanceNumber = count - place  # against the position
        for name, value in elements.items():
            setattr(dataset, name, value)
        path = folder / f"{series[-6:]}-{place:03d}.dcm"
        dataset.save_as(path, enforce_file_format=True)
        paths.append(path)
    return paths


@pytest.mark.parametrize("orientation", [AXIAL, [1, 0, 0, 0, 0, -1], [0, 1, 0, 0, 0, -1]])
def test_slices_are_sorted_along_their_normal(tmp_path, orientation):
    paths = write_slices(tmp_path, generate_uid(), 12, orientation=orientation)
    shuffled = random.Random(0).sample(paths, len(paths))
    assert sort_series(shuffled) == [paths]


def test_two_series_and_other_files_stand_apart(tmp_path):
    first, second = (write_slices(tmp_path, generate_uid(), 3) for _ in range(2))
    png = tmp_path / "a.png"
    png.write_bytes(b"\x89PNG")
    assert sort_series([*first, png, *second]) == [first, [png], second]


def test_a_scout_of_another_orientation_is_not_a_slice(tmp_path):
    series = generate_uid()
    scout = write_slices(tmp_path, series, 1, orientation=[1, 0, 0, 0, 0, -1])
    scout = [scout[0].rename(tmp_path / "scout.dcm")]
    slices = write_slices(tmp_path, series, 3)
    assert sort_series([*slices, *scout]) == [slices, scout]


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("ImagePositionPatient", None),
        ("ImagePositionPatient", [1.0, 2.0]),
        ("ImageOrientationPatient", None),
        ("SeriesInstanceUID", None),
        ("NumberOfFrames", 2),
    ],
)
def test_a_file_without_a_place_stands_alone(tmp_path, name, value):
    paths = write_slices(tmp_path, generate_uid(), 2, **{name: value})
    assert sort_series(paths) == [[path] for path in paths]


def test_every_file_that_pydicom_ships_is_sorted():
    from pathlib import Path

    paths = [path for path in map(Path, get_testdata_files()) if path.is_file()]
    groups = sort_series(paths)
    assert sorted(path for group in groups for path in group) == sorted(paths)
    assert [Path(get_testdata_file("CT_small.dcm", download=False))] in groups


class TestReadSeries:
    def test_the_order_is_that_of_highdicom(self, tmp_path, volume):
        write_ct(tmp_path, volume)
        datasets = [pydicom.dcmread(path) for path in sorted(tmp_path.iterdir())]
        spacing, places = highdicom.spatial.get_series_volume_positions(datasets)
        series = read_series(tmp_path)
        expected = [datasets[places.index(place)].filename for place in range(len(datasets))]
        found = [str(path) for path in series.files]
        assert found in (expected, expected[::-1])  # highdicom leaves open which end is first
        assert series.spacing == pytest.approx(spacing)

    @pytest.mark.parametrize(
        ("orientation", "plane"),
        [
            ((1, 0, 0, 0, 1, 0), "axial"),
            ((1, 0, 0, 0, 0, -1), "coronal"),
            ((0, 1, 0, 0, 0, -1), "sagittal"),
        ],
    )
    def test_slices_are_those_of_the_same_volume_in_nifti(
        self, tmp_path, volume, orientation, plane
    ):
        paths = write_ct(tmp_path / "ct", volume, orientation=orientation)
        normal = np.cross(orientation[:3], orientation[3:])
        lps = np.diag([1.0, 1, 1, 1])
        lps[:3, :3] = np.stack([orientation[:3], orientation[3:], 2.5 * normal], axis=1)
        affine = np.diag([-1.0, -1, 1, 1]) @ lps
        voxels = volume.transpose(2, 1, 0) - np.int16(1024)  # column, row, slice
        nibabel.save(nibabel.Nifti1Image(voxels, affine), tmp_path / "ct.nii")
        options = {"slices": {"num": 5, "plane": plane}, "window": (400, 3000)}
        from_series = image_parts(tmp_path / "ct", **options)
        from_nifti = image_parts(tmp_path / "ct.nii", **options)
        assert [part.place for part in from_series] == [part.place for part in from_nifti]
        for one, other in zip(from_series, from_nifti, strict=True):
            # DICOM's window is half a unit off NIfTI's: a grey level of 255 at most.
            difference = np.asarray(to_pil(one)).astype(int) - np.asarray(to_pil(other))
            assert np.abs(difference).max() <= 1
        assert len({part.source for part in from_series} & set(paths)) == 5

    def test_other_files_are_no_part_of_it(self, tmp_path, volume):
        paths = write_ct(tmp_path, volume)
        (tmp_path / "README.txt").write_text("a CT")
        shutil.copy(shipped("test-SR.dcm"), tmp_path / "report")
        assert sorted(read_series(tmp_path).files) == sorted(paths)

    def test_a_folder_that_has_changed_is_read_again(self, tmp_path, volume):
        paths = write_ct(tmp_path, volume)
        assert len(read_series(tmp_path).files) == 12
        paths[-1].unlink()
        os.utime(tmp_path, ns=(1, 1))
        assert len(read_series(tmp_path).files) == 11


def mixed_patients(folder, volume):
    for path in write_ct(folder, volume)[6:]:
        dataset = pydicom.dcmread(path)
        dataset.PatientID, dataset.PatientName = "MRN-0815", "Other^Secret"
        dataset.save_as(path)


def mixed_series(folder, volume):
    write_ct(folder, volume)
    for path in write_ct(folder / "other", volume[:2]):
        path.rename(folder / f"b{path.name}")
    (folder / "other").rmdir()


def lacking(folder, volume):
    paths = write_ct(folder, volume)
    for place in (4, 5, 9):
        paths[place].unlink()


def two_spacings(folder, volume):
    for path in write_ct(folder, volume)[6:]:
        dataset = pydicom.dcmread(path)
        dataset.ImagePositionPatient[2] = (dataset.ImagePositionPatient[2] - 15) * 1.3 + 15
        dataset.save_as(path)


def two_in_one_place(folder, volume):
    paths = write_ct(folder, volume)
    shutil.copy(paths[3], folder / "again.dcm")


def a_scout(folder, volume):
    dataset = pydicom.dcmread(write_ct(folder, volume)[0])
    dataset.ImageOrientationPatient = [1, 0, 0, 0, 0, -1]
    dataset.save_as(folder / "scout.dcm")


def a_broken_file(folder, volume):
    write_ct(folder, volume)[5].write_bytes(b"not DICOM" * 100)


def a_radiograph(folder, volume):
    dataset = pydicom.dcmread(write_ct(folder, volume)[0])
    del dataset.ImagePositionPatient
    dataset.save_as(folder / "flat.dcm")


def nothing(folder, volume):
    (folder / "README.txt").write_text("no images")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (mixed_patients, "slices of more than one patient: .* and 5 more, .* and 5 more"),
        (mixed_series, "slices of 2 series: .* and 11 more, b.* and 1 more"),
        (lacking, r"lacks 3 of 12 slices, the first between .* which are 7\.50 mm apart; others"),
        (two_spacings, r"two spacings: 2\.50 mm, and 3\.25 mm between"),
        (two_in_one_place, "two slices in one place, .*again.dcm"),
        (a_scout, r"slices of 2 sizes or orientations: .*scout\.dcm"),
        (a_broken_file, "035.dcm cannot be read as DICOM: it is broken"),
        (a_radiograph, "holds flat.dcm that is no slice of a series: .* no position"),
        (nothing, "holds no slices of a DICOM series"),
    ],
)
def test_what_is_not_one_series_is_refused_and_no_patient_is_named(
    tmp_path, volume, change, message
):
    change(tmp_path, volume)
    with pytest.raises(ValueError, match=message) as caught:
        read_series(tmp_path)
    text = str(caught.value)
    assert text.startswith(str(tmp_path))
    assert not any(secret in text for secret in ("Secret", "MRN", "1957", "1.2.826", "2026"))
