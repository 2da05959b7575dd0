"""Folders that are whole or not there: written beside, moved in one step, found after a kill.

| name | what it does |
|---|---|
| `writing`, `publish`, `remove` | write a folder aside, move it to its place, delete one |
| `staging_folder`, `clear_staging` | where folders are written |
| `checkpoints`, `newest_checkpoint` | the whole ones of a run |
"""

import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError

STAGING = ".unfinished"  # in a run's folder: what is being written or deleted
_CHECKPOINT = re.compile(r"checkpoint-(\d+)")


def staging_folder(run: Path) -> Path:
    """The folder in a run's folder for what is being written or deleted."""
    return run / STAGING


def clear_staging(run: Path) -> None:
    """Delete what a killed run left half written."""
    shutil.rmtree(staging_folder(run), ignore_errors=True)


@contextmanager
def writing(run: Path, name: str) -> Iterator[Path]:
    """A folder to write `name` in, not yet at its place; it is deleted if it cannot be completed.

    Raises:
        OSError: naming the last good checkpoint.
    """
    folder = staging_folder(run) / name
    try:
        yield folder
    # torch.save says RuntimeError for a full disk.
    except (OSError, RuntimeError, SafetensorError) as error:
        shutil.rmtree(folder, ignore_errors=True)
        good = newest_checkpoint(run)
        raise OSError(
            f"{name} could not be written: {error}. The last good checkpoint is "
            f"{good.name if good else 'none'}, and it is untouched. If the disk is full, make room "
            f"in {run}; start the recipe again, and it resumes from there."
        ) from error


def publish(written: Path, target: Path) -> None:
    """Move a finished folder to its place, after its bytes have reached the disk.

    A kill before the move leaves the old state, a kill after it the new one.
    """
    for path in sorted(written.rglob("*")):
        if path.is_file():
            _to_disk(path)
    _to_disk(written)
    if target.exists():  # an older run's; a kill between the two moves leaves neither
        remove(target, written.parent)
    os.rename(written, target)
    _to_disk(target.parent)


def remove(folder: Path, staging: Path) -> None:
    """Delete a folder so that no half of it is ever seen at its place."""
    staging.mkdir(parents=True, exist_ok=True)
    doomed = staging / f"deleted-{folder.name}-{os.getpid()}"
    os.rename(folder, doomed)
    shutil.rmtree(doomed, ignore_errors=True)


def checkpoints(run: Path) -> list[Path]:
    """The checkpoints of a run, oldest first; each is whole."""
    found = [
        (int(match[1]), path)
        for path in run.glob("checkpoint-*")
        if (match := _CHECKPOINT.fullmatch(path.name))
    ]
    return [path for _, path in sorted(found)]


def newest_checkpoint(run: Path) -> Path | None:
    """The checkpoint to resume from; None if there is none."""
    return next(reversed(checkpoints(run)), None)


def _to_disk(path: Path) -> None:
    if os.name == "nt" and path.is_dir():
        return  # Windows opens no folders, and writes its entries through
    # Windows flushes only what was opened for writing.
    descriptor = os.open(path, os.O_RDWR if os.name == "nt" else os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
