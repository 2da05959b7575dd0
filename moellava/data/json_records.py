"""A JSON list or a JSON-lines file as a sequence of records that are read when asked for.

Opening scans the file once and keeps eight bytes per record, however large the file is. The parser
is the standard library's; `datasets` reads a JSON list whole and refuses fields of mixed types,
such as LLaVA's `image`, which is a string in one row and a list in the next.
"""

import codecs
import json
import re
from array import array
from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import BinaryIO, overload

from moellava.data.rows import RowError
from moellava.storage.errors import reason_of

_CHUNK = 1 << 20  # bytes per read
# Characters of one record; a broken quote must not pull the whole file into memory.
_LONGEST = 1 << 26
_FIRST = 1000  # records that tell which columns a file has
_SPACE = re.compile(r"[ \t\r\n]*")
_DECODE = json.JSONDecoder().raw_decode


class JsonRecords(Sequence[object]):
    """The records of a file, by number.

    Each access reads its own bytes, so that workers may share the object.

    Raises:
        ValueError: the file is neither a JSON list nor JSON lines; the place is named.
        RowError: on access, a line that is not JSON.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        with self.path.open("rb") as file:
            start = len(codecs.BOM_UTF8) if file.read(3) == codecs.BOM_UTF8 else 0
            file.seek(start)
            self.is_list = file.read(4096).lstrip()[:1] == b"["
            file.seek(start)
            spans = _list_spans(file, self.path) if self.is_list else _line_spans(file)
            self._ends = array("q")
            self._starts = array("q")
            for begin, end in spans:
                self._starts.append(begin)
                self._ends.append(end)
        if not self._starts:
            raise ValueError(f"{self.path} holds no rows.")
        if not self.is_list and len(self._starts) > 1:
            self._refuse_a_spread_object()

    def __len__(self) -> int:
        return len(self._starts)

    @overload
    def __getitem__(self, index: int) -> object: ...
    @overload
    def __getitem__(self, index: slice) -> list[object]: ...
    def __getitem__(self, index: int | slice) -> object:
        if isinstance(index, slice):
            return [self[number] for number in range(*index.indices(len(self)))]
        if index < 0:
            index += len(self)
        if not 0 <= index < len(self):
            raise IndexError(f"row {index} of {len(self)}")
        with self.path.open("rb") as file:
            file.seek(self._starts[index])
            record = _parsed(file.read(self._ends[index] - self._starts[index]))
        if isinstance(record, RowError):
            raise record
        return record

    def scan(self) -> Iterator[object]:
        """Every record in order; for a line that is not JSON, its `RowError`."""
        with self.path.open("rb") as file:
            for start, end in zip(self._starts, self._ends, strict=True):
                file.seek(start)
                yield _parsed(file.read(end - start))

    @property
    def columns(self) -> tuple[str, ...]:
        """The keys of the first records, in the order in which they occur."""
        first = islice((record for record in self.scan() if isinstance(record, dict)), _FIRST)
        return tuple(dict.fromkeys(key for record in first for key in record))

    def _refuse_a_spread_object(self) -> None:
        """One object over many lines would else read as many broken rows."""
        first = next(self.scan())
        if isinstance(first, RowError):
            raise ValueError(
                f"{self.path} is neither a JSON list of rows nor JSON lines. Of its first line: "
                f"{first.reason}. If the rows stand under a key of one large object, write that "
                "list to a file of its own."
            )


def _parsed(data: bytes) -> object:
    try:
        return json.loads(data)
    except UnicodeDecodeError as error:
        return RowError(f"it is not JSON: {reason_of(error)}")
    except (ValueError, RecursionError) as error:
        return RowError(f"it is not JSON: {error}")


def _line_spans(file: BinaryIO) -> Iterator[tuple[int, int]]:
    start = file.tell()
    for line in file:
        if line.strip():
            yield start, start + len(line)
        start += len(line)


def _list_spans(file: BinaryIO, path: Path) -> Iterator[tuple[int, int]]:
    """Where each element of a JSON list begins and ends, in bytes."""
    window = _Window(file)
    count = 0
    try:
        window.take("[")
        while window.peek() != "]":
            if count:
                window.take(",")
                window.peek()
            yield window.skip_value()
            count += 1
        window.take("]")
        window.expect_end()
    except (ValueError, EOFError) as error:
        raise ValueError(
            f"{path} is broken JSON at byte {window.place}, after {count} complete rows: "
            f"{reason_of(error) if isinstance(error, UnicodeDecodeError) else error}"
        ) from error


class _Window:
    """A moving window of decoded text over a file that knows its place in bytes."""

    def __init__(self, file: BinaryIO) -> None:
        self.file = file
        self.place = file.tell()  # in the file, in bytes, of the cursor
        self._text, self._at = "", 0
        self._decoder = codecs.getincrementaldecoder("utf-8")()

    def peek(self) -> str:
        """The next character that is not a space; the cursor is put on it."""
        while True:
            match = _SPACE.match(self._text, self._at)
            assert match is not None  # matches nothing at least
            self._advance(match.end())
            if self._at < len(self._text):
                return self._text[self._at]
            if not self._read():
                raise EOFError("the file ends in the middle")

    def take(self, character: str) -> None:
        if self.peek() != character:
            raise ValueError(f"expected {character!r}, found {self._text[self._at]!r}")
        self._advance(self._at + 1)

    def expect_end(self) -> None:
        try:
            character = self.peek()
        except EOFError:
            return
        raise ValueError(f"{character!r} follows the closing bracket of the list")

    def skip_value(self) -> tuple[int, int]:
        start = self.place
        while True:
            try:
                _, end = _DECODE(self._text, self._at)
            except json.JSONDecodeError as error:
                # Cut off by the window, or broken.
                if len(self._text) - self._at > _LONGEST or not self._read():
                    raise ValueError(error.msg) from error
                continue
            # A number may go on: of `1`, `1.`, `1e` and `1e-`, each cut off there, the decoder
            # takes the `1`.
            if len(self._text) - end <= 2 and self._read():
                continue
            self._advance(end)
            return start, self.place

    def _advance(self, at: int) -> None:
        self.place += len(self._text[self._at : at].encode())
        self._at = at

    def _read(self) -> bool:
        # Doubled, so that retries stay linear.
        chunk = self.file.read(max(_CHUNK, len(self._text) - self._at))
        if not chunk:
            return False  # and every place in the text stays what it was
        self._text, self._at = self._text[self._at :] + self._decoder.decode(chunk), 0
        return True
