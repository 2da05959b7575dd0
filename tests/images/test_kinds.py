"""Another kind of image file is one `ImageKind`: it is then read wherever images are."""

import numpy as np
import pytest
from PIL import Image

from moellava import plugins
from moellava.data.convert import encoded
from moellava.images import ImageKind, is_image_file, load_image, register_image_kind
from moellava.images.kinds import IMAGE_KINDS, image_kinds, starts_with


def decode_raw(source, view, name):
    """Two bytes of signature, one of width, then grey values."""
    data = source if isinstance(source, bytes) else source.read_bytes()
    if len(data) < 3 or (len(data) - 3) % data[2]:
        raise ValueError(f"{name} is cut off.")
    return Image.fromarray(np.frombuffer(data[3:], np.uint8).reshape(-1, data[2]))


RAW = ImageKind(name="raw", suffixes=(".raw",), recognises=starts_with(b"RW"), decode=decode_raw)


@pytest.fixture(autouse=True)
def registry(monkeypatch):
    monkeypatch.setattr("moellava.images.kinds.IMAGE_KINDS", IMAGE_KINDS.copy())


def test_a_kind_of_ones_own_is_read_recognised_and_written(tmp_path):
    register_image_kind(RAW)
    data = b"RW\x03" + bytes(range(6))
    expected = np.arange(6).reshape(2, 3)
    (tmp_path / "a.raw").write_bytes(data)
    (tmp_path / "IM0001").write_bytes(data)
    for source in (data, tmp_path / "a.raw", tmp_path / "IM0001"):
        assert np.array_equal(np.asarray(load_image(source))[..., 0], expected)
    assert is_image_file(tmp_path / "a.raw")
    assert encoded(data) == (data, ".raw")
    with pytest.raises(ValueError, match=r"The encoded image is cut off"):
        load_image(data[:-1])


def test_a_name_is_taken_once():
    register_image_kind(RAW)
    register_image_kind(RAW)
    assert image_kinds().count(RAW) == 1
    with pytest.raises(ValueError, match="image kind 'raw' is registered already"):
        register_image_kind(
            ImageKind(name="raw", suffixes=(".r",), recognises=starts_with(b"R"), decode=decode_raw)
        )


def test_an_entry_point_registers_a_kind(monkeypatch):
    from types import SimpleNamespace

    entry = SimpleNamespace(load=lambda: lambda: register_image_kind(RAW))
    monkeypatch.setattr(
        plugins, "entry_points", lambda group: [entry] * (group == "moellava.images")
    )
    plugins.load_plugins.cache_clear()
    try:
        assert RAW in image_kinds()
    finally:
        plugins.load_plugins.cache_clear()


def test_what_a_file_holds_counts_more_than_its_suffix(tmp_path):
    Image.new("L", (4, 3), 9).save(tmp_path / "a.png")
    (tmp_path / "a.nii").write_bytes((tmp_path / "a.png").read_bytes())
    assert load_image(tmp_path / "a.nii").size == (4, 3)
