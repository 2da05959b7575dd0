"""A broken image of any kind on the command line: one line that names it, and exit status 1."""

import gzip
import io
import random
from pathlib import Path

import nibabel
import numpy as np
import pytest
from PIL import Image
from pydicom.data import get_testdata_file
from typer.testing import CliRunner

from moellava.cli import app
from moellava.images import load_image


def sample(suffix: str) -> bytes:
    if suffix == "dcm":
        with open(get_testdata_file("MR_small_jp2klossless.dcm", download=False), "rb") as file:
            return file.read()
    if suffix.startswith("nii"):
        volume = nibabel.Nifti1Image(np.arange(720, dtype=np.int16).reshape(8, 9, 10), np.eye(4))
        return gzip.compress(volume.to_bytes()) if suffix.endswith("gz") else volume.to_bytes()
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 255, (24, 32, 3), np.uint8))
    picture.save(file := io.BytesIO(), suffix)
    return file.getvalue()


def broken_ones(data: bytes, count: int, path: Path) -> list[bytes]:
    """The first mutations that cannot be read as this file."""
    rng, found = random.Random(5), []
    while len(found) < count:
        broken = bytearray(data)
        for _ in range(rng.randint(1, 8)):
            broken[rng.randrange(min(len(broken), 600))] = rng.randrange(256)
        if rng.random() < 0.5:
            del broken[rng.randrange(len(broken)) :]
        path.write_bytes(broken)
        try:
            load_image(path)
        except ValueError:
            found.append(bytes(broken))
    return found


@pytest.mark.parametrize("suffix", ["png", "tiff", "jpeg", "webp", "dcm", "nii", "nii.gz"])
def test_a_broken_image_is_one_line_and_exit_status_1(small_biomedclip, tmp_path, suffix):
    path = tmp_path / "images" / f"a.{suffix}"
    path.parent.mkdir()
    for number, broken in enumerate(broken_ones(sample(suffix), 3, path)):
        path.write_bytes(broken)
        out = tmp_path / f"{number}.safetensors"
        words = ["encode", path.parent, "--out", out, "--encoder", small_biomedclip]
        result = CliRunner().invoke(app, list(map(str, words)))
        assert result.exit_code == 1
        (line,) = result.stderr.splitlines()
        assert line.startswith(f"moellava: error: {path}"), line
        assert not out.exists()


@pytest.mark.parametrize(
    ("window", "message"),
    [
        ("lnug", "Did you mean 'lung'? Known: bone, brain, full, lung, mediastinum, soft."),
        ("lung", "a.png: the window 'lung' is in Hounsfield units"),
    ],
)
def test_a_window_that_means_nothing_is_one_line(small_biomedclip, tmp_path, window, message):
    Image.new("L", (32, 32)).save(tmp_path / "a.png")
    words = ["encode", tmp_path, "--out", tmp_path / "o", "--encoder", small_biomedclip]
    result = CliRunner().invoke(app, [*map(str, words), "--window", window])
    assert result.exit_code == 1
    (line,) = result.stderr.splitlines()
    assert message in line
