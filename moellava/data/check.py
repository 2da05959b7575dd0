"""Is a dataset fit for training? `check_rows` looks at every row and image and reports what is wrong."""

import hashlib
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, field
from typing import Any

from moellava.data.fingerprints import Fingerprint, fingerprint, image_key, near_pairs
from moellava.data.readers import Rows
from moellava.data.rows import IMAGE_TOKEN, Row
from moellava.images.threads import map_in_threads

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
        lengths: per row, in tokens, or in words where no tokenizer was given; image placeholders are not counted.
        by_split, by_answer_type: rows per value, "(none)" where the source says nothing.
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

    def as_dict(self) -> dict[str, Any]:
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
class _Seen:
    """What is kept of a row."""

    where: str
    id: str
    images: tuple[str, ...]
    text: bytes  # hash of its turns


def check_rows(
    rows: Rows,
    *,
    against: Rows | None = None,
    tokenizer: Any = None,
    max_distance: int = MAX_DISTANCE,
    progress: bool = False,
) -> Report:
    """Look at every row and read every image once.

    Args:
        rows: read with `skip_bad=True`, so that broken rows are in the report instead of stopping it.
        against: the test rows that must share no id and no image with `rows`.
        tokenizer: the language model's, for lengths in tokens.
        max_distance: perceptual hashes that differ in at most so many of 64 bits are the same image.
    """
    report = Report(rows.source, rows.format, unit="words" if tokenizer is None else "tokens")
    report.problems += [
        Problem(
            bad.kind,
            f"row {bad.index}" + (f" (id {bad.id!r})" if bad.id is not None else ""),
            bad.reason,
        )
        for bad in rows.bad
    ]
    length = _length_of(tokenizer)

    def count(row: Row) -> None:
        report.num_rows += 1
        report.lengths.append(length(row))
        report.by_split[row.split or "(none)"] += 1
        report.by_answer_type[row.answer_type or "(none)"] += 1

    seen, prints = _look(rows, report, count, progress)
    report.num_images = len(prints)
    _find_duplicates(rows, seen, prints, report)
    if against is not None:
        others, other_prints = _look(
            against, report, lambda row: None, progress, prefix=f"{against.source}, "
        )
        _find_leaks(rows, against, (seen, prints), (others, other_prints), max_distance, report)
    return report


def _look(
    rows: Rows, report: Report, count: Callable[[Row], None], progress: bool, prefix: str = ""
) -> tuple[list[_Seen], dict[str, Fingerprint]]:
    """Go through the rows once; read each distinct image once, a batch at a time, in threads."""
    seen: list[_Seen] = []
    prints: dict[str, Fingerprint] = {}
    known: set[str] = set()
    waiting: list[tuple[str, Any, str]] = []

    def read_waiting() -> None:
        for (key, _, where), result in zip(
            waiting, map_in_threads(_try, (item[1] for item in waiting)), strict=True
        ):
            if isinstance(result, Fingerprint):
                prints[key] = result
            else:
                kind = (
                    "missing image" if isinstance(result, FileNotFoundError) else "unreadable image"
                )
                report.problems.append(Problem(kind, where, str(result)))
        waiting.clear()

    for index, row in enumerate(_with_progress(rows, progress)):
        where = f"{prefix}row {rows.number(index)}" + (f" (id {row.id!r})" if rows.has_ids else "")
        count(row)
        keys = tuple(image_key(image) for image in row.images)
        for key, image in zip(keys, row.images, strict=True):
            if key not in known:
                known.add(key)
                waiting.append((key, image, where))
        if len(waiting) >= _BATCH:
            read_waiting()
        turns = "\0".join(f"{turn.role}\0{turn.text}" for turn in row.turns)
        seen.append(_Seen(where, row.id, keys, hashlib.sha256(turns.encode()).digest()))
    read_waiting()
    return seen, prints


def _try(image: Any) -> Fingerprint | Exception:
    try:
        return fingerprint(image)
    except (OSError, ValueError, TypeError) as error:
        return error


def _with_progress(rows: Rows, progress: bool) -> Iterable[Row]:
    if not progress:
        return rows
    from tqdm.auto import tqdm

    return tqdm(rows, desc=rows.source, unit="row")


def _find_duplicates(
    rows: Rows, seen: list[_Seen], prints: dict[str, Fingerprint], report: Report
) -> None:
    first_by_content: dict[Any, str] = {}
    first_by_id: dict[str, str] = {}
    for row in seen:
        content = (
            tuple(prints[key].exact if key in prints else key for key in row.images),
            row.text,
        )
        if content in first_by_content:
            report.problems.append(
                Problem(
                    "duplicate row",
                    row.where,
                    f"same images and turns as {first_by_content[content]}",
                )
            )
        first_by_content.setdefault(content, row.where)
        if rows.has_ids:
            if row.id in first_by_id:
                report.problems.append(
                    Problem(
                        "duplicate id",
                        row.where,
                        f"the id of {first_by_id[row.id]}",
                        is_error=False,
                    )
                )
            first_by_id.setdefault(row.id, row.where)


def _find_leaks(
    rows: Rows,
    against: Rows,
    train: tuple[list[_Seen], dict[str, Fingerprint]],
    test: tuple[list[_Seen], dict[str, Fingerprint]],
    max_distance: int,
    report: Report,
) -> None:
    """Ids, exact images and similar images that both sides have; one problem for each pair of images."""
    if rows.has_ids and against.has_ids:
        test_ids = {row.id: row.where for row in test[0]}
        for row in train[0]:
            if row.id in test_ids:
                report.problems.append(
                    Problem("leak: same id", row.where, f"is also {test_ids[row.id]}")
                )
    train_rows, test_rows = (_rows_by_image(*side) for side in (train, test))
    for exact in train_rows.keys() & test_rows.keys():
        report.problems.append(
            Problem(
                "leak: same image",
                _first(train_rows[exact]),
                f"its image is also in {_first(test_rows[exact])}",
            )
        )
    sides = []
    for _, prints in (train, test):
        distinct = {
            one.exact: one.perceptual for one in prints.values() if one.perceptual is not None
        }
        sides.append((list(distinct), list(distinct.values())))
    for i, j, distance in near_pairs(sides[0][1], sides[1][1], max_distance):
        one, other = sides[0][0][i], sides[1][0][j]
        if (
            one != other and other not in train_rows and one not in test_rows
        ):  # those are told already
            where = _first(train_rows[one])
            detail = f"its image resembles that of {_first(test_rows[other])} ({distance} of 64 bits differ)"
            report.problems.append(Problem("leak: similar image", where, detail))


def _rows_by_image(seen: list[_Seen], prints: dict[str, Fingerprint]) -> dict[str, list[str]]:
    found: dict[str, list[str]] = defaultdict(list)
    for row in seen:
        for key in row.images:
            if key in prints:
                found[prints[key].exact].append(row.where)
    return found


def _first(places: list[str]) -> str:
    return places[0] if len(places) == 1 else f"{places[0]} and {len(places) - 1} more"


def _length_of(tokenizer: Any) -> Callable[[Row], int]:
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
