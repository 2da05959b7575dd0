"""Rows that can be trained on, found before the first step: `usable_rows`."""

import io
import logging
import os
from collections.abc import Sequence
from pathlib import Path
from typing import overload

from PIL import Image
from tqdm.auto import tqdm

from moellava.data.rows import Row
from moellava.images import ImagePart
from moellava.images.threads import map_in_threads
from moellava.messages import first_names
from moellava.storage.errors import refuse_stand_in

logger = logging.getLogger(__name__)

_AT_ONCE = 1024  # rows between two moves of the bar


def usable_rows(
    rows: Sequence[Row],
    key: str,
    *,
    skip_bad: bool,
    show_progress: bool,
    remedy: str = "Mend them, or leave them out with data.skip_bad=true.",
) -> Sequence[Row]:
    """The rows that have an answer and images whose files open.

    Only headers are read: a picture that breaks off in the middle is found when its turn comes.

    Args:
        key: the recipe key that names the rows, for messages.
        skip_bad: leave the others out, named in a warning.
        remedy: the last sentence of the error without `skip_bad`.

    Raises:
        ValueError: if a row cannot be used, or with `skip_bad` if none can.
    """
    bad: dict[int, str] = {}
    with tqdm(
        total=len(rows), desc=f"Checking {key}", unit="row", disable=not show_progress
    ) as bar:
        for start in range(0, len(rows), _AT_ONCE):
            numbers = range(start, min(start + _AT_ONCE, len(rows)))
            reasons = map_in_threads(lambda number: _what_is_wrong(rows[number]), numbers)
            bad |= {
                number: reason
                for number, reason in zip(numbers, reasons, strict=True)
                if reason is not None
            }
            bar.update(len(numbers))
    if not bad:
        return rows
    named = first_names([f"{rows[number].id!r} ({reason})" for number, reason in bad.items()])
    found = f"{len(bad)} of {len(rows)} rows of {key} cannot be used: {named}."
    if not skip_bad:
        raise ValueError(f"{found} {remedy}")
    if len(bad) == len(rows):
        raise ValueError(found)
    logger.warning("%s They are left out.", found)
    return _Chosen(rows, [number for number in range(len(rows)) if number not in bad])


class _Chosen(Sequence[Row]):
    """Some rows of a sequence, read when asked for."""

    def __init__(self, rows: Sequence[Row], numbers: Sequence[int]) -> None:
        self._rows, self._numbers = rows, numbers

    def __len__(self) -> int:
        return len(self._numbers)

    @overload
    def __getitem__(self, index: int) -> Row: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[Row]: ...
    def __getitem__(self, index: int | slice) -> Row | Sequence[Row]:
        if isinstance(index, slice):
            return _Chosen(self._rows, self._numbers[index])
        return self._rows[self._numbers[index]]


def _what_is_wrong(row: Row) -> str | None:
    if row.answer is None:
        return "it has no answer"
    try:
        for image in row.images:
            _open_header(image)
    except (OSError, ValueError, SyntaxError) as error:
        return str(error)
    return None


def _open_header(image: object) -> None:
    """Raise an error if a file does not open; what is in memory already is left alone."""
    if isinstance(image, ImagePart):
        if image.region is None:  # a slide was opened to find the region
            _open_header(image.source)
    elif isinstance(image, bytes):
        if image[128:132] != b"DICM":
            Image.open(io.BytesIO(image)).close()
    elif isinstance(image, str | os.PathLike):
        path = Path(image)
        if not path.exists():
            raise FileNotFoundError(f"the image {path} does not exist")
        if not path.is_file():
            raise ValueError(f"the image {path} is not a file")
        refuse_stand_in(path)
        if path.suffix.lower() in Image.registered_extensions():
            Image.open(path).close()
        elif path.stat().st_size == 0:  # DICOM and NIfTI are read when their turn comes
            raise ValueError(f"the image {path} is empty")
