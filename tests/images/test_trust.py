"""What a hostile, broken or unusual image file may not do."""

import io
import logging
import os
import random
import warnings
from pathlib import Path

import nibabel
import numpy as np
import pydicom
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image, ImageOps
from pydicom.uid import DeflatedExplicitVRLittleEndian

from moellava.images import load_image, to_pil

from .conftest import dicom_dataset, ramp

# Several thousand on request: MOELLAVA_MUTATIONS=5000.
MUTATIONS = int(os.environ.get("MOELLAVA_MUTATIONS", "150"))
NAME, ID = "ZZMARKEDZZ^NAME", "IDMARKED4711"


def marked_bytes() -> bytes:
    dataset = dicom_dataset(ramp(side=20), WindowCenter=40, WindowWidth=400)
    dataset.PatientName, dataset.PatientID, dataset.StationName = NAME, ID, ID
    buffer = io.BytesIO()
    dataset.save_as(buffer, enforce_file_format=True)
    return buffer.getvalue()


MARKED = marked_bytes()


class TestPatients:
    @settings(max_examples=200, deadline=None, suppress_health_check=list(HealthCheck))
    @given(st.integers(132, len(MARKED) - 820), st.integers(0, 255))
    def test_no_value_is_said_whatever_length_is_wrong(self, caplog, place, value):
        """A wrong length makes one element swallow others, whose values pydicom would quote."""
        caplog.set_level(logging.DEBUG)
        data = bytearray(MARKED)
        data[place] = value
        said = ""
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            try:
                load_image(bytes(data))
            except ValueError as error:
                said = f"{error} {error.__cause__}"
        said += caplog.text + " ".join(str(warning.message) for warning in caught)
        assert "MARKED" not in said

    @pytest.mark.parametrize(
        "keyword", ["Modality", "PhotometricInterpretation", "NumberOfFrames", "SOPClassUID"]
    )
    def test_not_even_elements_of_the_picture_are_quoted(self, tmp_path, keyword):
        dataset = dicom_dataset(ramp(), WindowCenter=40, WindowWidth=400)
        dataset.add_new(keyword, "LO", "MARKED")
        if keyword == "SOPClassUID":
            del dataset.Rows
        dataset.save_as(tmp_path / "a.dcm", enforce_file_format=False)
        with pytest.raises(ValueError, match=r"a\.dcm") as error:
            load_image(tmp_path / "a.dcm", window="lung")
        assert "MARKED" not in str(error.value)


class TestOrientation:
    @pytest.mark.parametrize("orientation", range(1, 9))
    @pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "TIFF", "MPO"])
    def test_a_picture_stands_as_a_viewer_shows_it(self, tmp_path, kind, orientation):
        pixels = np.zeros((48, 64, 3), np.uint8)
        pixels[:16, :24] = (255, 0, 0)
        exif = Image.Exif()
        exif[0x0112] = orientation
        options = {"save_all": True} if kind == "MPO" else {}
        path = tmp_path / f"a.{kind.lower()}"
        Image.fromarray(pixels).save(path, kind, exif=exif, **options)
        expected = np.asarray(ImageOps.exif_transpose(Image.open(path)).convert("RGB"))
        assert expected.shape[:2] == ((64, 48) if orientation > 4 else (48, 64))
        for source in (path, path.read_bytes()):
            assert np.array_equal(np.asarray(load_image(source)), expected)

    def test_a_broken_block_of_exif_does_not_stop_the_reading(self, tmp_path):
        path = tmp_path / "a.jpg"
        Image.new("RGB", (8, 6)).save(path, exif=b"Exif\0\0II*\0\xff\xff\xff\x7f" + b"\xff" * 9)
        assert load_image(path).size == (8, 6)


class TestBombs:
    def test_a_strip_is_refused_before_a_tower_resizes_it(self, tmp_path):
        Image.new("1", (1, 100_000)).save(tmp_path / "a.png")
        with pytest.raises(ValueError, match=r"a\.png asks for 100,000 \(aspect\).*MAX_ASPECT"):
            load_image(tmp_path / "a.png")

    def test_voxels_of_extreme_sides_are_refused(self, tmp_path):
        affine = np.diag([1, 1e-6, 1, 1])
        nibabel.save(nibabel.Nifti1Image(np.zeros((9, 9, 9), np.uint8), affine), tmp_path / "a.nii")
        with pytest.raises(ValueError, match=r"a\.nii asks for .* \(aspect\)"):
            load_image(tmp_path / "a.nii", frame=0)

    def test_a_deflated_dicom_is_counted_before_it_is_inflated(self, tmp_path, monkeypatch):
        monkeypatch.setenv("MOELLAVA_MAX_UNPACKED", "100000")
        dataset = dicom_dataset(np.zeros((500, 500), np.uint8))
        dataset.file_meta.TransferSyntaxUID = DeflatedExplicitVRLittleEndian
        dataset.save_as(tmp_path / "a.dcm", enforce_file_format=True)
        monkeypatch.setattr(pydicom, "dcmread", lambda *a, **k: pytest.fail("it was inflated"))
        with pytest.raises(ValueError, match=r"a\.dcm asks for .*unpacked.*MOELLAVA_MAX_UNPACKED"):
            load_image(tmp_path / "a.dcm")

    def test_a_grid_is_refused_before_its_frames_are_decoded(self, tmp_path, monkeypatch):
        frames = [Image.new("L", (300, 200), value) for value in range(16)]
        frames[0].save(tmp_path / "a.tif", save_all=True, append_images=frames[1:])
        monkeypatch.setattr(Image.Image, "load", lambda self: pytest.fail("it was decoded"))
        with pytest.raises(ValueError, match=r"a\.tif is 1200x800 pixels, beyond the limit"):
            load_image(tmp_path / "a.tif", frame="grid", max_pixels=500_000)

    def test_a_pipe_is_refused_instead_of_waited_for(self, tmp_path):
        os.mkfifo(tmp_path / "a.png")
        for path in (tmp_path / "a.png", Path("/dev/zero")):
            with pytest.raises(ValueError, match="is not a regular file"):
                load_image(path)


@pytest.mark.parametrize("view", [{"plane": "coronal"}, {"plane": "axial"}, {"volume": 1}])
def test_a_plane_of_a_flat_picture_is_an_error(view, save_dicom):
    for source in (Image.new("L", (4, 4)), np.zeros((4, 4), np.uint8), save_dicom(ramp())):
        with pytest.raises(ValueError, match="is not a volume"):
            load_image(source, **view)


@pytest.mark.parametrize("sequence", ["VOILUTSequence", "ModalityLUTSequence"])
def test_an_empty_item_of_a_lookup_table_counts_as_absent(save_dicom, sequence):
    window = {"WindowCenter": 1000, "WindowWidth": 2000}
    expected = np.asarray(load_image(save_dicom(ramp(), **window)))
    item = pydicom.Dataset()
    item.add_new("LUTDescriptor", "SS", None)
    item.add_new("LUTData", "OW", None)
    for items in ([item], []):
        path = save_dicom(ramp(), **window, **{sequence: items})
        assert np.array_equal(np.asarray(load_image(path)), expected)


def samples() -> dict[str, bytes]:
    """A small file of each kind."""
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 255, (24, 32, 3), np.uint8))
    found = {"dcm": MARKED}
    for kind in ("png", "jpeg", "tiff", "gif", "webp", "bmp"):
        buffer = io.BytesIO()
        picture.save(buffer, kind)
        found[kind] = buffer.getvalue()
    volume = nibabel.Nifti1Image(np.arange(720, dtype=np.int16).reshape(8, 9, 10), np.eye(4))
    found["nii"] = volume.to_bytes()
    import gzip

    found["nii.gz"] = gzip.compress(found["nii"], mtime=0)
    return found


@pytest.mark.parametrize(("suffix", "data"), samples().items(), ids=samples())
def test_mutated_files_are_read_or_refused_by_name(tmp_path, suffix, data):
    rng = random.Random(7)
    path = tmp_path / f"a.{suffix}"
    for _ in range(MUTATIONS):
        broken = bytearray(data)
        for _ in range(rng.randint(1, 8)):
            broken[rng.randrange(min(len(broken), 2000))] = rng.randrange(256)
        if rng.random() < 0.3:
            del broken[rng.randrange(len(broken)) :]
        path.write_bytes(broken)
        for source, name in ((path, str(path)), (bytes(broken), "The encoded image")):
            try:
                to_pil(source)
            except ValueError as error:  # noqa: PERF203
                assert str(error).startswith(name), error  # noqa: PT017
