"""A zip archive of images → a folder of them, once: `unpacked`."""

import hashlib
import os
import shutil
import zipfile
from pathlib import Path

from moellava.storage.errors import reading
from moellava.storage.limits import require_within


def unpacked(archive: Path) -> Path:
    """The folder with the files of a zip archive, in the cache of `datasets`.

    The folder is named by the checksums in the archive, so that a replaced archive is unpacked
    anew. It takes its name when all files are in it, so that a killed unpacking does not count.

    Raises:
        ValueError: not a zip archive, a damaged one, or one that unpacks beyond the limit
            `expansion` of `moellava.storage.limits`.
        OSError: the disk has too little room.
    """
    from datasets import config
    from filelock import FileLock

    with reading(archive, "a zip archive"), zipfile.ZipFile(archive) as files:
        members = files.infolist()
        size = sum(member.file_size for member in members)
        require_within("expansion", size // max(1, archive.stat().st_size), archive)
        folder = Path(config.EXTRACTED_DATASETS_PATH) / _checksum(members)
        folder.parent.mkdir(parents=True, exist_ok=True)
        # The other processes of a training wait for the first one.
        with FileLock(f"{folder}.lock"):
            if not folder.is_dir():
                _unpack(archive, files, size, folder)
    return folder


def _checksum(members: list[zipfile.ZipInfo]) -> str:
    digest = hashlib.sha256()
    for member in members:
        digest.update(f"{member.filename}\0{member.CRC}\0{member.file_size}\n".encode())
    return digest.hexdigest()


def _unpack(archive: Path, files: zipfile.ZipFile, size: int, folder: Path) -> None:
    room = shutil.disk_usage(folder.parent).free
    if size > room:
        raise OSError(
            f"{archive} unpacks to {size:,} bytes, but {folder.parent} has room for {room:,}. Free "
            "some, or set HF_DATASETS_CACHE to another disk."
        )
    part = folder.with_name(f"{folder.name}.part")
    shutil.rmtree(part, ignore_errors=True)  # of a killed process
    try:
        files.extractall(part)  # names that lead out of the folder lose what leads there
        os.rename(part, folder)
    finally:
        shutil.rmtree(part, ignore_errors=True)
