"""What a hostile, broken or unusual image file may not do."""

import io
import json
import os
import random
import socket
import subprocess
import sys
from pathlib import Path

import nibabel
import numpy as np
import pydicom
import pytest
from PIL import Image
from pydicom.uid import DeflatedExplicitVRLittleEndian

from moellava.images import View, load_image, to_pil

from .conftest import dicom_dataset, ramp

# Several thousand on request: MOELLAVA_MUTATIONS=5000.
QUICK_BOMBS = (
    *("1x1000000.png", "60000x60000.png", "deflated_600.dcm", "jpeg_in_small.dcm"),
    *("run_length.dcm", "voxels.nii.gz", "grid_of_millions.tif", "grey16.png"),
)
READ_BOMBS = ("grey16.png",)  # within the limits: it is read in bounded memory
MUTATIONS = int(os.environ.get("MOELLAVA_MUTATIONS", "150"))


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

    @pytest.mark.parametrize("suffix", ["png", "dcm", "nii", "nii.gz"])
    def test_pipes_devices_and_sockets_are_refused_instead_of_waited_for(self, tmp_path, suffix):
        os.mkfifo(tmp_path / f"pipe.{suffix}")
        (tmp_path / f"link.{suffix}").symlink_to("/dev/zero")
        (tmp_path / f"folder.{suffix}").mkdir()
        with socket.socket(socket.AF_UNIX) as listener:
            listener.bind(str(tmp_path / f"socket.{suffix}"))
            for path in (*tmp_path.iterdir(), Path("/dev/zero"), Path("/dev/stdin")):
                with pytest.raises(ValueError, match=f"{path} is not a regular file"):
                    load_image(path)

    def test_a_grid_of_endlessly_many_is_refused(self):
        with pytest.raises(ValueError, match=r"frame='grid:9999' asks for .*MOELLAVA_MAX_GRID"):
            View(frame="grid:9999")

    def test_a_frame_of_too_many_bytes_is_refused_before_it_is_decoded(
        self, save_dicom, monkeypatch
    ):
        monkeypatch.setenv("MOELLAVA_MAX_FRAME", "10000")
        path = save_dicom(ramp())
        monkeypatch.setattr(pydicom.pixels, "pixel_array", lambda *a, **k: pytest.fail("decoded"))
        with pytest.raises(ValueError, match=r"scan\.dcm asks for 180,000 \(frame\).*_MAX_FRAME"):
            load_image(path)

    @pytest.mark.parametrize("plane", ["axial", "sagittal"])
    def test_slices_of_too_many_bytes_are_refused_before_they_are_read(
        self, tmp_path, monkeypatch, plane
    ):
        volume = nibabel.Nifti1Image(np.zeros((20, 30, 40), np.int16), np.eye(4))
        nibabel.save(volume, tmp_path / "a.nii.gz")
        # Across the axis that varies fastest nibabel reads all 24,000 values, 8 bytes each.
        monkeypatch.setenv("MOELLAVA_MAX_FRAME", "150000")
        if plane == "axial":
            load_image(tmp_path / "a.nii.gz", plane=plane)
            monkeypatch.setenv("MOELLAVA_MAX_FRAME", "1000")
        with pytest.raises(ValueError, match=r"a\.nii\.gz asks for .*\(frame\)"):
            load_image(tmp_path / "a.nii.gz", plane=plane)

    def test_gzipped_bytes_are_counted_as_they_unpack(self, monkeypatch):
        monkeypatch.setenv("MOELLAVA_MAX_UNPACKED", "1000")
        with pytest.raises(ValueError, match=r"encoded image asks for .*\(unpacked\)"):
            load_image(samples()["nii.gz"])

    def test_postscript_is_not_given_to_ghostscript(self, tmp_path, monkeypatch):
        Image.new("RGB", (4, 4)).save(tmp_path / "a.eps")
        (tmp_path / "a.png").write_bytes((tmp_path / "a.eps").read_bytes())
        monkeypatch.setattr(subprocess, "check_call", lambda *a, **k: pytest.fail("it was run"))
        for name in ("a.eps", "a.png"):
            with pytest.raises(ValueError, match=f"{name} cannot be read .* format is unknown"):
                load_image(tmp_path / name)

    def test_the_memory_of_bombs_is_bounded(self):
        """In a child of its own, whose peak is seen; all of them on request: bombs.py."""
        script = Path(__file__).with_name("bombs.py")
        child = subprocess.run(
            [sys.executable, script, *QUICK_BOMBS], capture_output=True, text=True, check=True
        )
        results = [json.loads(line) for line in child.stdout.splitlines()]
        assert {result["name"] for result in results} == set(QUICK_BOMBS)
        for result in results:
            assert result["above_mib"] < 1536, result
            is_refused = not result["end"].startswith("read")
            assert is_refused == (result["name"] not in READ_BOMBS), result


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
    half = pydicom.Dataset()  # entries, and nothing that says how many
    half.add_new("LUTDescriptor", "SS", None)
    half.add_new("LUTData", "OW", bytes(8))
    for items in ([item], [half], []):
        path = save_dicom(ramp(), **window, **{sequence: items})
        assert np.array_equal(np.asarray(load_image(path)), expected)


def samples() -> dict[str, bytes]:
    """A small file of each kind."""
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 255, (24, 32, 3), np.uint8))
    dataset = dicom_dataset(ramp(side=20), WindowCenter=40, WindowWidth=400)
    dataset.save_as(file := io.BytesIO(), enforce_file_format=True)
    found = {"dcm": file.getvalue()}
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
