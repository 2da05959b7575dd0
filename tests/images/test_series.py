"""Stacks of slices among files in any order."""

import random

import numpy as np
import pytest
from pydicom.data import get_testdata_file, get_testdata_files
from pydicom.uid import generate_uid

from moellava.images import sort_series

from .conftest import CT_IMAGE, dicom_dataset

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
