"""Is a dataset fit for training? `check_rows` looks at every row and image and reports."""

import hashlib
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass, field
from itertools import islice
from typing import TYPE_CHECKING

import numpy as np
from tqdm.auto import tqdm

from moellava.data.fingerprints import Fingerprint, fingerprint, near_pairs
from moellava.data.readers import Rows
from moellava.data.rows import IMAGE_TOKEN, Row
from moellava.images import ImageLike, image_key, map_in_threads

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

MAX_DISTANCE = 4  # of 64 bits: a resized or re-encoded copy usually differs in 0 to 2
_BATCH = 64  # images read at a time


@dataclass(frozen=True)
class Problem:
    """One thing that is wrong.

    Args:
        kind: such as "missing image", "duplicate row", "leak: same image".
        where: the row's number and id.
        detail: what was found.
        is_error: False for what may be meant, such as an id that two rows share.
    """

    kind: str
    where: str
    detail: str
    is_error: bool = True


@dataclass
class Report:
    """What `check_rows` has seen.

    Args:
        num_rows: rows that can be used.
        num_images: distinct images of those rows.
        lengths: per row, in tokens, or in words if no tokenizer was given; image placeholders are
            not counted.
        by_split, by_answer_type: rows per value, "(none)" if the source says nothing.
    """

    source: str
    format: str
    num_rows: int = 0
    num_images: int = 0
    lengths: list[int] = field(default_factory=list)
    unit: str = "words"
    by_split: Counter[str] = field(default_factory=Counter)
    by_answer_type: Counter[str] = field(default_factory=Counter)
    problems: list[Problem] = field(default_factory=list)

    @property
    def num_errors(self) -> int:
        return sum(problem.is_error for problem in self.problems)

    def as_dict(self) -> dict[str, object]:
        """For JSON: counts, a summary of the lengths, and every problem."""
        lengths = sorted(self.lengths)
        places = {"shortest": 0, "median": len(lengths) // 2, "longest": len(lengths) - 1}
        return {
            "source": self.source,
            "format": self.format,
            "rows": self.num_rows,
            "images": self.num_images,
            "errors": self.num_errors,
            "by_split": dict(self.by_split),
            "by_answer_type": dict(self.by_answer_type),
            "lengths": {
                "unit": self.unit,
                **{name: lengths[at] for name, at in places.items() if lengths},
            },
            "problems": [asdict(problem) for problem in self.problems],
        }


@dataclass(frozen=True)
class SeenRow:
    """What is kept of a row: its place, its id, the keys of its images, a hash of its turns."""

    where: str
    id: str
    images: tuple[str, ...]
    text: bytes
    has_answer: bool = True


@dataclass(frozen=True)
class Side:
    """One of the two data sets that are compared, after every image was read.

    Args:
        rows: in order.
        prints: of the images that could be read, by their keys.
        has_ids: whether the rows have ids of their own.
    """

    rows: list[SeenRow]
    prints: dict[str, Fingerprint]
    has_ids: bool

    def rows_by_image(self) -> dict[str, list[str]]:
        """The places of the rows that have an image, by its exact hash."""
        found: dict[str, list[str]] = defaultdict(list)
        for row in self.rows:
            for key in row.images:
                if key in self.prints:
                    found[self.prints[key].exact].append(row.where)
        return found

    def perceptual_hashes(self) -> dict[str, np.ndarray]:
        """Of each distinct image that has one, by its exact hash."""
        return {
            one.exact: one.perceptual for one in self.prints.values() if one.perceptual is not None
        }


def check_rows(
    rows: Rows,
    *,
    against: Rows | None = None,
    tokenizer: "PreTrainedTokenizerBase | None" = None,
    max_distance: int = MAX_DISTANCE,
    progress: bool = False,
) -> Report:
    """Look at every row and read every image once.

    Args:
        rows: read with `skip_bad=True`, so that broken rows are reported instead of stopping it.
        against: the test rows that must share no id and no image with `rows`.
        tokenizer: the language model's, for lengths in tokens.
        max_distance: images are similar if their perceptual hashes differ in at most so many of 64
            bits.
    """
    report = Report(rows.source, rows.format, unit="words" if tokenizer is None else "tokens")
    for bad in rows.bad:
        named = f" (id {bad.id!r})" if bad.id is not None else ""
        report.problems.append(Problem(bad.kind, f"row {bad.index}{named}", bad.reason))
    length = _length_of(tokenizer)

    def count(row: Row) -> None:
        report.num_rows += 1
        report.lengths.append(length(row))
        report.by_split[row.split or "(none)"] += 1
        report.by_answer_type[row.answer_type or "(none)"] += 1

    side, problems = look_at(rows, visit=count, progress=progress)
    report.problems += problems
    report.problems += [
        Problem("no answer", row.where, "no turn of the assistant to learn from")
        for row in side.rows
        if not row.has_answer
    ]
    report.num_images = len(side.prints)
    report.problems += find_duplicates(side)
    if against is not None:
        other, problems = look_at(against, prefix=f"{against.source}, ", progress=progress)
        report.problems += problems
        report.problems += find_leaks(side, other, max_distance)
    return report


def look_at(
    rows: Rows,
    *,
    visit: Callable[[Row], None] = lambda row: None,
    prefix: str = "",
    progress: bool = False,
) -> tuple[Side, list[Problem]]:
    """Go through the rows once and read each distinct image once, in threads.

    Args:
        visit: called with each row.
        prefix: of the places in problems.

    Returns:
        What was seen, and the images that could not be read.
    """
    shown: Iterable[Row] = tqdm(rows, desc=rows.source, unit="row") if progress else rows
    seen: list[SeenRow] = []

    def new_images() -> Iterator[tuple[str, ImageLike, str]]:
        known: set[str] = set()
        for index, row in enumerate(shown):
            visit(row)
            named = f" (id {row.id!r})" if rows.has_ids else ""
            where = f"{prefix}row {rows.number(index)}{named}"
            keys = tuple(image_key(image) for image in row.images)
            seen.append(SeenRow(where, row.id, keys, _text_hash(row), row.answer is not None))
            for key, image in zip(keys, row.images, strict=True):
                if key not in known:
                    known.add(key)
                    yield key, image, where

    prints: dict[str, Fingerprint] = {}
    problems: list[Problem] = []
    waiting = new_images()
    while batch := list(islice(waiting, _BATCH)):
        results = map_in_threads(_try, [image for _, image, _ in batch])
        for (key, _, where), result in zip(batch, results, strict=True):
            if isinstance(result, Fingerprint):
                prints[key] = result
            else:
                is_missing = isinstance(result, FileNotFoundError)
                kind = "missing image" if is_missing else "unreadable image"
                problems.append(Problem(kind, where, str(result)))
    return Side(seen, prints, rows.has_ids), problems


def find_duplicates(side: Side) -> Iterator[Problem]:
    """Rows of the same images and turns, and rows of one id."""
    first_by_content: dict[tuple[tuple[str, ...], bytes], str] = {}
    first_by_id: dict[str, str] = {}
    for row in side.rows:
        images = tuple(side.prints[key].exact if key in side.prints else key for key in row.images)
        first = first_by_content.setdefault((images, row.text), row.where)
        if first != row.where:
            yield Problem("duplicate row", row.where, f"same images and turns as {first}")
        if side.has_ids:
            first = first_by_id.setdefault(row.id, row.where)
            if first != row.where:
                yield Problem("duplicate id", row.where, f"the id of {first}", is_error=False)


def find_leaks(train: Side, test: Side, max_distance: int) -> Iterator[Problem]:
    """Ids, exact images and similar images that both have; a problem for each pair of images."""
    if train.has_ids and test.has_ids:
        test_ids = {row.id: row.where for row in test.rows}
        for row in train.rows:
            if row.id in test_ids:
                yield Problem("leak: same id", row.where, f"is also {test_ids[row.id]}")
    train_rows, test_rows = train.rows_by_image(), test.rows_by_image()
    for exact in train_rows.keys() & test_rows.keys():
        where, other = _first(train_rows[exact]), _first(test_rows[exact])
        yield Problem("leak: same image", where, f"its image is also in {other}")
    train_hashes, test_hashes = train.perceptual_hashes(), test.perceptual_hashes()
    train_images, test_images = list(train_hashes), list(test_hashes)
    pairs = near_pairs(list(train_hashes.values()), list(test_hashes.values()), max_distance)
    for i, j, distance in pairs:
        one, like = train_images[i], test_images[j]
        if one == like or like in train_rows or one in test_rows:
            continue  # told already
        detail = (
            f"its image resembles that of {_first(test_rows[like])} ({distance} of 64 bits differ)"
        )
        yield Problem("leak: similar image", _first(train_rows[one]), detail)


def _text_hash(row: Row) -> bytes:
    turns = "\0".join(f"{turn.role}\0{turn.text}" for turn in row.turns)
    return hashlib.sha256(turns.encode(errors="surrogatepass")).digest()


def _try(image: ImageLike) -> Fingerprint | Exception:
    try:
        return fingerprint(image)
    except (OSError, ValueError, TypeError) as error:
        return error


def _first(places: list[str]) -> str:
    return places[0] if len(places) == 1 else f"{places[0]} and {len(places) - 1} more"


def _length_of(tokenizer: "PreTrainedTokenizerBase | None") -> Callable[[Row], int]:
    def text(row: Row) -> str:
        return "\n".join(turn.text.replace(IMAGE_TOKEN, "") for turn in row.turns)

    if tokenizer is None:
        return lambda row: len(text(row).split())
    if tokenizer.chat_template is None:
        return lambda row: len(tokenizer(text(row)).input_ids)

    def length(row: Row) -> int:
        turns = [
            {"role": turn.role, "content": turn.text.replace(IMAGE_TOKEN, "")} for turn in row.turns
        ]
        return len(tokenizer(tokenizer.apply_chat_template(turns, tokenize=False)).input_ids)

    return length
