"""One image → the pictures that it stands for, each opened when it is needed."""

import pickle
from pathlib import Path

import nibabel
import numpy as np
import pydicom
import pytest
from nibabel.testing import data_path
from PIL import Image

from moellava.images import exact_hash, image_key, image_parts, load_image, to_pil, with_words
from moellava.images.dicom_file import DicomFile
from moellava.images.parts import spaced
from moellava.storage.limits import LIMITS

from .conftest import decoded, dicom_dataset, shipped, write_ct

VOLUME = str(Path(data_path) / "anatomical.nii")  # 33 x 41 x 25
CINE = shipped("examples_ybr_color.dcm")  # 30 frames of ultrasound


def pixels(parts):
    return [np.asarray(to_pil(part)) for part in parts]


def test_one_picture_is_one_part_without_words():
    (part,) = image_parts(CINE, frame=3)
    assert part.place == ""
    assert np.array_equal(to_pil(part), to_pil(CINE, frame=3))
    assert with_words([part]) == [part]
    assert image_parts(part) == [part]


@pytest.mark.parametrize(("num", "first", "last"), [(1, 0, 29), (8, 0, 29), (7, 5, 13)])
def test_numbers_are_in_the_middle_of_equal_parts(num, first, last):
    found = spaced(num, 30, first, last, "")
    edges = np.linspace(first, last + 1, num + 1)
    assert np.array_equal(found, np.floor((edges[:-1] + edges[1:]) / 2))
    assert len(set(np.diff(found))) <= 2
    assert spaced(num, 30, first - 30, last - 30, "") == found  # negative from the end


@pytest.mark.parametrize("plane", ["axial", "coronal", "sagittal"])
def test_slices_of_a_volume_are_those_of_nibabels_canonical_axes(plane):
    parts = image_parts(VOLUME, slices={"num": 4, "plane": plane}, window=(4000, 8000))
    assert [part.place for part in parts] == [f"slice {at} of 4, {plane}" for at in (1, 2, 3, 4)]
    volume = nibabel.as_closest_canonical(nibabel.load(VOLUME))
    axis = {"sagittal": 0, "coronal": 1, "axial": 2}[plane]
    count = volume.shape[axis]
    for part, number in zip(parts, [(2 * at + 1) * count // 8 for at in range(4)], strict=True):
        values = volume.get_fdata().take(number, axis)[::-1, ::-1].T
        expected = np.rint(np.clip(values / 8000, 0, 1) * 255)
        assert np.array_equal(to_pil(part), expected)


def test_a_volume_may_be_in_memory():
    expected = pixels(image_parts(VOLUME, slices=3))
    for source in (nibabel.load(VOLUME), Path(VOLUME).read_bytes()):
        assert all(map(np.array_equal, pixels(image_parts(source, slices=3)), expected))


def test_frames_are_those_of_pydicom():
    parts = image_parts(CINE, frames={"num": 4, "first": 10, "last": -1})
    assert [part.place for part in parts] == [f"frame {at} of 4" for at in (1, 2, 3, 4)]
    for part, number in zip(parts, (12, 17, 22, 27), strict=True):
        assert np.array_equal(to_pil(part), pydicom.pixels.pixel_array(CINE, index=number))


def test_frames_of_an_animation(tmp_path):
    frames = [Image.new("L", (8, 8), grey) for grey in (0, 50, 100, 150, 200, 250)]
    frames[0].save(tmp_path / "cine.gif", save_all=True, append_images=frames[1:])
    with Image.open(tmp_path / "cine.gif") as opened:
        for source in (tmp_path / "cine.gif", opened, (tmp_path / "cine.gif").read_bytes()):
            found = [load_image(part).getpixel((0, 0))[0] for part in image_parts(source, frames=3)]
            assert found == [50, 150, 250]


def test_three_windows_are_the_channels_of_one_picture(tmp_path, volume):
    (path, *_) = write_ct(tmp_path, volume)
    nibabel.save(nibabel.Nifti1Image(volume - np.int16(1024), np.eye(4)), tmp_path / "ct.nii")
    values = volume[0].astype(np.int32)
    windows = ("lung", "mediastinum", "bone")
    for source, options in ((path, {}), (tmp_path / "ct.nii", {"frame": 2}), (values, {})):
        if source is values:
            windows = ((400, 1500), (1000, 350), (1400, 1800))
        picture = np.asarray(load_image(source, channels=windows, **options))
        for channel, window in enumerate(windows):
            alone = np.asarray(load_image(source, window=window, **options))[..., 0]
            assert np.array_equal(picture[..., channel], alone)


def test_only_the_chosen_files_are_opened_for_their_pixels(tmp_path, monkeypatch):
    volume = np.random.default_rng(0).integers(0, 3000, (40, 256, 256)).astype(np.int16)
    write_ct(tmp_path, volume)
    opened = []
    values = DicomFile.values
    monkeypatch.setattr(
        DicomFile, "values", lambda file, frame: opened.append(file.source) or values(file, frame)
    )
    before = bytes_read()
    parts = image_parts(tmp_path, slices=4, channels=("lung", "mediastinum", "bone"))
    after_headers = bytes_read()
    shown = [to_pil(part) for part in parts]
    assert opened == [part.source for part in parts]
    slice_bytes = volume[0].nbytes
    assert after_headers - before < len(volume) * slice_bytes / 4
    assert bytes_read() - after_headers < 1.5 * len(parts) * slice_bytes
    for picture, number in zip(shown, (5, 15, 25, 35), strict=True):
        expected = decoded(tmp_path / f"{number * 7 % 101:03d}.dcm", window="bone")
        assert np.array_equal(np.asarray(picture)[..., 2], expected)


def bytes_read() -> int:
    """Of files, by this process, from the disk or its cache."""
    text = Path("/proc/self/io").read_text()
    return int(text.partition("rchar: ")[2].split()[0])


def test_a_part_has_a_name_and_a_hash_of_its_own():
    first, second = image_parts(VOLUME, slices=2, window=(4000, 8000))
    assert image_key(first) == f"{VOLUME}#frame=6&plane=axial&window=4000.0,8000.0"
    assert image_key(image_parts(VOLUME)[0]) == VOLUME
    assert len({exact_hash(first), exact_hash(second), exact_hash(VOLUME)}) == 3
    assert exact_hash(image_parts(VOLUME)[0]) == exact_hash(VOLUME)
    again = pickle.loads(pickle.dumps(first))
    assert again == first
    assert "slice 1 of 2, axial" in repr(again)


@pytest.mark.parametrize(
    ("source", "options", "message"),
    [
        (
            VOLUME,
            {"slices": 26},
            "of axial slices the volume has 25 in the range",
        ),
        (
            VOLUME,
            {"slices": {"num": 2, "first": 20, "last": 30}},
            "25, 0 to 24; the range from",
        ),
        (VOLUME, {"slices": {"num": 2, "plane": "axail"}}, "Unknown plane 'axail'.*'axial'"),
        (VOLUME, {"slices": {"nmu": 2}}, "Unknown key of slices 'nmu'.*'num'"),
        (VOLUME, {"slices": {"plane": "axial"}}, "num of slices is missing; expected a whole"),
        (VOLUME, {"slices": 0}, "num of slices is 0; expected a whole number of at least 1"),
        (VOLUME, {"slices": True}, "num of slices is True"),
        (VOLUME, {"slices": 257}, r"slices asks for 257 \(pictures\), but the limit is 256"),
        (VOLUME, {"frames": 4}, "anatomical.nii is a volume, which has no frames. Give slices="),
        (VOLUME, {"slices": 4, "frame": 3}, "frame and slices are both given"),
        (VOLUME, {"slices": 4, "frames": 3}, "slices and frames are both given"),
        (VOLUME, {"slcies": 4}, "Unknown option of an image 'slcies'.*'slices'"),
        (CINE, {"frames": 31}, "examples_ybr_color.dcm: of frames the file has 30 in the range"),
        (CINE, {"slices": 4}, "is not a volume; slices= is for NIfTI .* frames= is for the frames"),
        (shipped("CT_small.dcm"), {"frames": 2}, "has 1 in the range, and num is 2"),
        ("missing.nii", {"slices": 4}, "The image missing.nii does not exist"),
        (VOLUME, {"channels": ("lung", "bone")}, "expected three windows"),
        (VOLUME, {"channels": "lung"}, "channels is 'lung'; expected three windows"),
        (VOLUME, {"channels": ("lung", "bone", "soft"), "window": "lung"}, "are both given"),
        (VOLUME, {"channels": ("lung", "bone", "sfot")}, "Unknown window 'sfot'.*'soft'"),
    ],
)
def test_what_does_not_go_together_is_said(source, options, message):
    with pytest.raises((ValueError, OSError), match=message):
        image_parts(source, **options)


def test_a_series_has_one_plane(tmp_path, volume):
    write_ct(tmp_path, volume)
    with pytest.raises(ValueError, match="holds axial slices, not coronal ones"):
        image_parts(tmp_path, slices=3, plane="coronal")
    with pytest.raises(ValueError, match="is a folder; frames= is for one file"):
        image_parts(tmp_path, frames=3)


def test_colour_has_no_channels(tmp_path):
    with pytest.raises(ValueError, match="in colour; a window is for grey images"):
        to_pil(CINE, frame=0, channels=("lung", "bone", "soft"))
    dicom_dataset(np.zeros((4, 4), np.uint16), Modality="MR").save_as(tmp_path / "mr.dcm")
    with pytest.raises(ValueError, match="Hounsfield units, and this is MR"):
        to_pil(tmp_path / "mr.dcm", channels=("lung", "bone", "soft"))


def test_the_number_of_files_is_bounded(tmp_path, volume, monkeypatch):
    write_ct(tmp_path, volume)
    monkeypatch.setitem(LIMITS, "slices", 5)
    with pytest.raises(ValueError, match=r"asks for 12 \(slices\), but the limit is 5"):
        image_parts(tmp_path, slices=3)
