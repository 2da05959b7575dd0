"""One error for every file that cannot be read: a `ValueError` or `OSError` that names it.

reading                     a context around any library that reads or parses a file
refuse_stand_in             a Git LFS pointer or a web page in place of the file
"""

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

LFS_FIRST_LINE = b"version https://git-lfs.github.com/spec/v1"
_LFS_MOST_BYTES = 1024  # a pointer is about 130 bytes long
_UTF16_MARKS = (b"\xff\xfe", b"\xfe\xff")
_MOST_CHARACTERS = 300  # of a reason: some libraries print the file


@contextmanager
def reading(path: str | os.PathLike[str], what: str = "") -> Iterator[None]:
    """Name the file in whatever error its content causes.

    Args:
        path: the file or folder that the block reads, or the hub id of a repo.
        what: what was expected, such as "safetensors" or "a NIfTI image".

    Raises:
        OSError, ImportError: from the block; the file is named.
        TypeError, ValueError: from the block, if they name the file already.
        ValueError: in place of any other error, which is its cause.
    """
    refuse_stand_in(path)
    try:
        yield
    except ImportError:
        raise
    except BaseException as error:
        if not _is_about_content(error) or (_may_leave(error) and str(path) in str(error)):
            raise
        kind = OSError if isinstance(error, OSError) else ValueError
        raise kind(_explanation(path, what, error)) from error


def refuse_stand_in(path: str | os.PathLike[str]) -> None:
    """Raise `ValueError` if a Git LFS pointer lies in place of the file."""
    if _is_lfs_pointer(Path(path)):
        raise ValueError(
            f"{path} is a Git LFS pointer, not the file itself. Fetch it with `git lfs pull`, or "
            "with `hf download`."
        )


def _is_about_content(error: BaseException) -> bool:
    names = {cls.__name__ for cls in type(error).__mro__}
    if "OutOfMemoryError" in names:  # of a GPU: the file may be sound
        return False
    # Panics of Rust libraries (tokenizers, safetensors) are not Exceptions to Python.
    return isinstance(error, Exception) or "PanicException" in names


def _may_leave(error: BaseException) -> bool:
    """Whether callers expect an error of this kind; subclasses such as UnicodeError are not."""
    return isinstance(error, OSError) or type(error) in (ValueError, TypeError)


def _explanation(path: str | os.PathLike[str], what: str, error: BaseException) -> str:
    expected = f" as {what}" if what else ""
    place = Path(path)
    if place.is_dir():
        pointers = [file for file in sorted(place.iterdir()) if _is_lfs_pointer(file)]
        if pointers:
            return f"{pointers[0]} is a Git LFS pointer, not the file itself: type `git lfs pull`."
    if not place.is_file():
        return f"{path} cannot be read{expected}: {reason_of(error)}"
    size = place.stat().st_size
    return (
        f"{path} ({size} bytes) cannot be read{expected}: {_first_sight(place) or reason_of(error)}"
    )


def _first_sight(file: Path) -> str:
    """What the first bytes say better than a parser's complaint about them."""
    with file.open("rb") as stream:
        head = stream.read(64).lstrip()
    if not head:
        return "it is empty."
    if head[:9].lower() == b"<!doctype" or head[:5].lower() == b"<html":
        return "it is a web page; download the file itself."
    if head.startswith(_UTF16_MARKS):
        return "it is UTF-16; save it as UTF-8."
    return ""


def reason_of(error: BaseException) -> str:
    """One line that says what is wrong, without torch's advice to load unsafely."""
    if type(error).__name__ == "DatasetGenerationError" and error.__cause__ is not None:
        return reason_of(error.__cause__)  # datasets puts nothing of it into its own text
    if isinstance(error, UnicodeDecodeError):
        return f"it is not {error.encoding.upper()} at byte {error.start}; save it as UTF-8."
    text = str(error)
    refused = re.search(r"WeightsUnpickler error:\s*(.+)", text)
    line = refused[1] if refused else next(iter(text.strip().splitlines()), "")
    line = "".join(letter if letter.isprintable() else "?" for letter in line).strip()
    if len(line) > _MOST_CHARACTERS:
        line = f"{line[:_MOST_CHARACTERS]}..."
    is_sentence = isinstance(error, OSError | ValueError | RuntimeError) and " " in line
    return line if is_sentence else f"{type(error).__name__} {line}".strip()


def _is_lfs_pointer(path: Path) -> bool:
    try:
        if not path.is_file() or path.stat().st_size > _LFS_MOST_BYTES:
            return False
        with path.open("rb") as file:
            return file.read(len(LFS_FIRST_LINE)) == LFS_FIRST_LINE
    except (OSError, ValueError):  # a name that no file can have
        return False
