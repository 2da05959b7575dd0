"""Compressed DICOM pixels: which plug-ins are used, and that no broken file ends the process."""

import ast
import importlib
import io
import json
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pydicom
import pytest
from PIL import Image
from pydicom.encaps import encapsulate
from pydicom.pixels.decoders import base

from moellava.images import load_image
from moellava.images.dicom_decoders import (
    PACKAGES,
    SAFE_PLUGINS,
    codestream_size,
    safe_plugins,
)

from .conftest import decoded, shipped

ROOT = Path(__file__).parents[2]
COMPRESSED = {
    str(uid): decoder
    for uid, (decoder, _) in base._PIXEL_DATA_DECODERS.items()
    if decoder.is_encapsulated
}
MODULES = {"pydicom": "rle"}  # where pydicom's module is not called as its plug-in is


def packages_of(plugin: str, uid: str) -> set[str]:
    """The packages with which a plug-in decodes a transfer syntax, by pydicom's own table."""
    module = importlib.import_module(f"pydicom.pixels.decoders.{MODULES.get(plugin, plugin)}")
    words = {word.partition(">")[0] for word in module.DECODER_DEPENDENCIES.get(uid, ())}
    return words - {"numpy"} or {"pydicom"} if uid in module.DECODER_DEPENDENCIES else set()


def extra() -> set[str]:
    """The packages that `moellava[dicom]` installs, Pillow among them."""
    text = (ROOT / "pyproject.toml").read_text()
    words = ast.literal_eval(re.search(r"^dicom = (\[.*\])", text, re.MULTILINE)[1])
    assert '"pillow>=' in text.partition("[project.optional-dependencies]")[0]
    return {word.partition(">")[0] for word in words} | {"pillow"}


def test_the_extra_names_each_decoder_and_gdcm_is_not_among_them():
    assert not [word for word in extra() if "[" in word]
    assert "python-gdcm" not in extra()
    assert {"pydicom", "pylibjpeg", "pylibjpeg-openjpeg", "pyjpegls"} <= extra()


def rows_of_the_guide() -> Iterator[str]:
    for uid in COMPRESSED:
        by_extra, further = set(), set()
        for plugin in ["pydicom"] if packages_of("pydicom", uid) else SAFE_PLUGINS:
            packages = packages_of(plugin, uid)
            own = packages - {"pylibjpeg"}  # which only joins its plug-ins to pydicom
            if packages:
                (by_extra if packages <= extra() else further).update(own)
        cells = [", ".join(sorted(words)) or "none" for words in (by_extra, further)]
        yield f"| {pydicom.uid.UID(uid).name} | {' | '.join(cells)} |"


def test_the_guide_has_pydicoms_own_table_of_decoders():
    guide = (ROOT / "docs" / "data.md").read_text()
    for row in rows_of_the_guide():
        assert row in guide


@pytest.mark.parametrize("uid", COMPRESSED)
def test_what_to_install_decodes_it_by_pydicoms_own_table(uid):
    if uid in PACKAGES:
        words = set(PACKAGES[uid].partition("  ")[0].split())
        assert words in [packages_of(plugin, uid) for plugin in SAFE_PLUGINS]
    else:
        assert packages_of("pillow", uid) or packages_of("pydicom", uid)


@pytest.mark.parametrize(
    "name", ["SC_rgb_jpeg_dcmtk.dcm", "MR_small_jp2klossless.dcm", "MR_small_jpeg_ls_lossless.dcm"]
)
def test_gdcm_is_not_used_even_where_it_is_installed(monkeypatch, name):
    path = shipped(name)
    uid = str(pydicom.dcmread(path).file_meta.TransferSyntaxUID)
    decoder = COMPRESSED[uid]
    used = []

    def gdcm(src, runner):
        used.append("gdcm")
        raise RuntimeError("it would abort here")

    others = {plugin: decode for plugin, decode in decoder._available.items() if plugin != "gdcm"}
    monkeypatch.setattr(decoder, "_available", {"gdcm": gdcm, **others})  # first, as pydicom has it
    assert "gdcm" in decoder.available_plugins
    assert set(safe_plugins(uid)) <= set(SAFE_PLUGINS)
    decoded(path)
    assert not used


def test_where_only_gdcm_is_installed_another_package_is_named(monkeypatch):
    path = shipped("SC_rgb_jpeg_gdcm.dcm")
    uid = str(pydicom.dcmread(path).file_meta.TransferSyntaxUID)
    monkeypatch.setattr(COMPRESSED[uid], "_available", {"gdcm": pytest.fail})
    with pytest.raises(
        ValueError, match=r"gdcm\.dcm: no .* pip install pylibjpeg pylibjpeg-libjpeg  \(GPLv3\)"
    ):
        load_image(path)


@pytest.mark.parametrize("kind", ["JPEG", "JPEG2000"])
def test_a_codestream_larger_than_its_header_says_is_refused_before_it_is_decoded(
    save_dicom, monkeypatch, kind
):
    file = io.BytesIO()
    Image.new("L", (300, 200)).save(file, kind)
    path = save_dicom(np.zeros((8, 10), np.uint8))
    dataset = pydicom.dcmread(path)
    dataset.file_meta.TransferSyntaxUID = (
        pydicom.uid.JPEGBaseline8Bit if kind == "JPEG" else pydicom.uid.JPEG2000
    )
    dataset.PixelData = encapsulate([file.getvalue()])
    dataset.save_as(path)
    monkeypatch.setattr(pydicom.pixels, "pixel_array", lambda *a, **k: pytest.fail("decoded"))
    for most in (0, 1 << 20):  # as a large file, and as a small one
        monkeypatch.setattr("moellava.images.dicom_file.READ_WHOLE", most)
        with pytest.raises(ValueError, match=r"scan\.dcm is broken: .* 300x200 .* says 10x8"):
            load_image(path)


@pytest.mark.parametrize(("kind", "options"), [("JPEG", {}), ("JPEG2000", {"no_jp2": True})])
@pytest.mark.parametrize("size", [(5, 9), (700, 40)])
def test_the_size_of_a_codestream_equals_pillows(kind, options, size):
    for comment in (b"", b"x" * 3000) if kind == "JPEG" else (b"",):
        file = io.BytesIO()
        Image.new("RGB", size).save(file, kind, comment=comment, **options)
        assert codestream_size(file.getvalue()) == Image.open(file).size
        assert codestream_size(file.getvalue()[:12]) is None


def test_the_size_of_a_jpeg_ls_equals_the_headers():
    dataset = pydicom.dcmread(shipped("MR_small_jpeg_ls_lossless.dcm"))
    (frame,) = pydicom.encaps.generate_frames(dataset.PixelData, number_of_frames=1)
    assert codestream_size(frame) == (dataset.Columns, dataset.Rows)


def test_the_process_survives_mutations_of_pydicoms_files():
    """In a child, whose death would be seen; thousands on request: tests/images/mutations.py."""
    child = subprocess.run(
        [sys.executable, Path(__file__).with_name("mutations.py"), "--count", "500"],
        capture_output=True,
        text=True,
        check=False,
    )
    last = child.stdout.strip().splitlines()[-1:]
    assert child.returncode == 0, f"it died at {last}: {child.stderr[-2000:]}"
    summary = json.loads(last[0])
    assert summary["faults"] == []
    assert summary["ends"]["picture"] > 30  # or hardly any would have reached a decoder
    assert summary["ends"]["DicomError"] > 30
    assert summary["mib_above_before"] < 1536
