"""Zip archives of images: unpacked whole, anew when they change, and within limits."""

import json
import os
import signal
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from moellava.data import read_rows
from moellava.data.archives import unpacked
from moellava.images import load_image
from moellava.testing import write_slake
from moellava.testing.datasets import picture


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch) -> Path:
    monkeypatch.setattr("datasets.config.EXTRACTED_DATASETS_PATH", tmp_path / "cache")
    return tmp_path / "cache"


def zip_of(path: Path, **files: bytes) -> Path:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in files.items():
            archive.writestr(name, data)
    return path


def test_a_replaced_archive_shows_its_new_images(tmp_path):
    """Also if it has the size and the time of the old one."""
    slake = write_slake(tmp_path / "slake")
    before = load_image(read_rows(slake / "test.json")[0].images[0])
    archive = slake / "imgs.zip"
    with zipfile.ZipFile(archive) as files:
        names = [member.filename for member in files.infolist() if not member.is_dir()]
    times = archive.stat().st_atime_ns, archive.stat().st_mtime_ns
    with zipfile.ZipFile(archive, "w") as files:
        for name in names:
            picture(99).save(tmp_path / "new.jpg")
            files.write(tmp_path / "new.jpg", name)
    os.utime(archive, ns=times)
    after = load_image(read_rows(slake / "test.json")[0].images[0])
    assert after.tobytes() != before.tobytes()
    assert after.size == before.size


KILLED = """
import os, signal, sys
from pathlib import Path
import datasets.config
datasets.config.EXTRACTED_DATASETS_PATH = Path(sys.argv[2])
import zipfile
own = zipfile.ZipFile._extract_member
def extract(self, member, *rest):
    result = own(self, member, *rest)
    os.kill(os.getpid(), signal.SIGKILL)
zipfile.ZipFile._extract_member = extract
from moellava.data.archives import unpacked
unpacked(Path(sys.argv[1]))
"""


def test_a_killed_unpacking_does_not_count(tmp_path, cache):
    archive = zip_of(tmp_path / "a.zip", one=b"1", two=b"2")
    killed = subprocess.run([sys.executable, "-c", KILLED, str(archive), str(cache)], timeout=100)
    assert killed.returncode == -signal.SIGKILL
    assert list(cache.rglob("one"))
    folder = unpacked(archive)
    assert sorted(path.name for path in folder.iterdir()) == ["one", "two"]
    assert not list(cache.glob("*.part"))


def test_an_archive_is_unpacked_once(tmp_path):
    archive = zip_of(tmp_path / "a.zip", one=b"1")
    times = [(unpacked(archive) / "one").stat().st_mtime_ns for _ in range(2)]
    assert times[0] == times[1]


def test_a_bomb_is_refused_before_it_is_unpacked(tmp_path, cache):
    archive = zip_of(tmp_path / "bomb.zip", zeros=bytes(2**23))
    with pytest.raises(ValueError, match=r"bomb\.zip asks for .*MOELLAVA_MAX_EXPANSION"):
        unpacked(archive)
    assert not cache.exists()


def test_an_archive_that_lies_about_its_sizes_is_refused(tmp_path, cache):
    """The sizes in the directory bound what is written, and the checksum shows the lie."""
    archive = zip_of(tmp_path / "lies.zip", zeros=bytes(2**23))
    data = archive.read_bytes()
    true, small = (number.to_bytes(4, "little") for number in (2**23, 10))
    archive.write_bytes(data.replace(true, small))
    with pytest.raises(ValueError, match=r"lies\.zip .*cannot be read as a zip archive"):
        unpacked(archive)
    assert not [path for path in cache.iterdir() if path.is_dir()]


def test_names_that_lead_outside_stay_inside(tmp_path):
    names = {"../../above": b"x", "/absolute": b"x", "in/../../up": b"x"}
    folder = unpacked(zip_of(tmp_path / "a.zip", **names))
    written = [path for path in tmp_path.rglob("*") if path.name in ("above", "absolute", "up")]
    assert len(written) == 3
    assert all(path.is_relative_to(folder) for path in written)


@pytest.mark.parametrize(
    ("data", "said"),
    [
        (b"", "it is empty"),
        (b"<html>404</html>", "it is a web page"),
        (b"PK\x03\x04 cut off", "not a zip file"),
        (b"version https://git-lfs.github.com/spec/v1\n", "is a Git LFS pointer"),
    ],
)
def test_what_is_not_an_archive_is_named(tmp_path, data, said):
    (tmp_path / "train.json").write_text(
        json.dumps(
            [{"qid": 1, "q_lang": "en", "img_name": "a.jpg", "question": "?", "answer": "."}]
        )
    )
    (tmp_path / "imgs.zip").write_bytes(data)
    with pytest.raises(ValueError, match=rf"imgs\.zip.*{said}"):
        read_rows(tmp_path / "train.json")


def test_a_full_disk_is_said_before_anything_is_written(tmp_path, cache, monkeypatch):
    monkeypatch.setattr(
        "moellava.data.archives.shutil.disk_usage", lambda _: type("Usage", (), {"free": 1})
    )
    with pytest.raises(OSError, match=r"a\.zip unpacks to 3 bytes, but .* has room for 1"):
        unpacked(zip_of(tmp_path / "a.zip", one=b"123"))
    assert not [path for path in cache.iterdir() if path.is_dir()]
