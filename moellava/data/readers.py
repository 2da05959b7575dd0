"""A file, folder or hub id in, rows out: `read_rows`."""

import logging
from array import array
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import overload

from moellava.data.formats import Format, find_format
from moellava.data.layouts import Context
from moellava.data.locate import Location, find_image_root, locate
from moellava.data.records import Records, open_records
from moellava.data.rows import Row, RowError, checked, with_parts

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class BadRow:
    """A row that was left out: its number in the file, its id if it has one, and what was wrong."""

    index: int
    id: str | None
    kind: str
    reason: str


class Rows(Sequence[Row]):
    """The rows of one split of a dataset, read when asked for; opening checks every row once.

    Attributes:
        format: the name of the layout that was read.
        source: the file or id, as messages name it.
        image_root: the folder that relative image paths start from.
        bad: the rows that `skip_bad=True` left out.
        num_not_asked: rows of another split or language.
        has_ids: whether the source names its rows; if it does not, ids are row numbers.
    """

    def __init__(
        self, records: Records, form: Format, context: Context, source: str, skip_bad: bool
    ) -> None:
        self.format, self.source, self.image_root = form.name, source, context.image_root
        # Not the form, whose lambdas do not go to spawned workers.
        self._records, self._to_row, self._context = records, form.to_row, context
        self.bad: list[BadRow] = []
        self.num_not_asked = 0
        self.has_ids = False
        self._kept = array("q", self._check(form, skip_bad))
        if self.bad:
            kinds = Counter(bad.kind for bad in self.bad)
            first = self.bad[0]
            logger.warning(
                "%s: %d of %d rows left out (%s); the first is row %d: %s",
                source,
                len(self.bad),
                len(records),
                ", ".join(f"{count} {kind}" for kind, count in kinds.items()),
                first.index,
                first.reason,
            )
        logger.info("%s: %d rows read as %s", source, len(self._kept), form.name)

    def __len__(self) -> int:
        return len(self._kept)

    @overload
    def __getitem__(self, index: int) -> Row: ...
    @overload
    def __getitem__(self, index: slice) -> list[Row]: ...
    def __getitem__(self, index: int | slice) -> Row | list[Row]:
        """A row; or, for a slice, a list of rows."""
        if isinstance(index, slice):
            return [self[number] for number in range(*index.indices(len(self)))]
        number = self._kept[index]
        row = self._convert(self._records[number], number)
        assert row is not None  # the rows not asked for are not among the kept
        return row

    def number(self, index: int) -> int:
        """The number in the file, from 0, of the row at `index`."""
        return self._kept[index]

    def _check(self, form: Format, skip_bad: bool) -> Iterator[int]:
        for index, record in enumerate(self._records.scan()):
            try:
                if isinstance(record, RowError):
                    raise record
                row = self._convert(record, index)
            except RowError as problem:
                row_id = _id_of(record, form)
                if not skip_bad:
                    raise problem.at(self.source, index, row_id) from None
                self.bad.append(BadRow(index, row_id, problem.kind, problem.reason))
                continue
            if row is None:
                self.num_not_asked += 1
            else:
                self.has_ids = self.has_ids or row.id != str(index)
                yield index

    def _convert(self, record: object, index: int) -> Row | None:
        if not isinstance(record, dict):
            raise RowError(f"it is a {type(record).__name__}; expected an object")
        try:
            row = self._to_row(record, index, self._context)
        except KeyError as error:
            raise RowError(f"it has no {error}; it has {sorted(record)}") from error
        if row is None:
            return None
        if self._context.only_split not in (None, row.split):
            return None
        return checked(with_parts(row))


def read_rows(
    path_or_id: str | Path,
    *,
    images: str | Path | None = None,
    format: str = "auto",
    split: str | None = None,
    skip_bad: bool = False,
    language: str | None = None,
    class_names: Sequence[str] | None = None,
    question: str | None = None,
    derive_answer_type: bool = False,
    revision: str | None = None,
    cache_dir: str | Path | None = None,
    local_files_only: bool = False,
) -> Rows:
    """Read a dataset of images and conversations in the form in which it is downloaded.

    Args:
        path_or_id: a file (.json, .jsonl, .csv, .parquet, MedMNIST's .npz), a folder of them, or a
            hub id.
        images: the folder that relative image paths start from; by default looked for beside the
            file.
        format: a name of `FORMATS`; "auto" tells it from the columns and the name.
        split: such as "train"; needed if a folder, repo or file has several.
        skip_bad: leave broken rows out, listed in `.bad` and counted in a warning, instead of
            raising at the first.
        language: of SLAKE, "en" or "zh"; None keeps both.
        class_names: of a classification set, in the order of its labels; by default the set's own.
        question: of a classification set, in place of "Which of these does the image show: ...?".
        derive_answer_type: if the source has no answer types, CLOSED for yes or no, else OPEN.
        revision, cache_dir, local_files_only: of a hub id.
    Raises:
        RowError: a broken row; file, number, id and what is wrong are named.
        ValueError: the layout, the split or a name is not known; those that are known are listed.
        FileNotFoundError: there is no such file and no such repo.
    """
    where = locate(
        path_or_id, split, revision=revision, cache_dir=cache_dir, local_files_only=local_files_only
    )
    records = open_records(where.files, where.split, str(cache_dir) if cache_dir else None)
    form = find_format(format, frozenset(records.columns), where.name)
    names = tuple(class_names or ()) or getattr(records, "class_names", ())
    context = Context(
        image_root=find_image_root(where, form, records.scan(), images),
        split=where.split,
        only_split=split if where.split_in_rows else None,
        language=language,
        class_names=names or (_medmnist_names(where) if form.name == "classification" else ()),
        question=question,
        derive_answer_type=derive_answer_type,
    )
    rows = Rows(records, form, context, where.name, skip_bad)
    if not rows:
        asked = f" of split {split!r}" if split else ""
        hint = " Leave split out to read all." if where.split_in_rows and split else ""
        raise ValueError(f"{where.name}: no usable row{asked} among {len(records)}.{hint}")
    return rows


def _medmnist_names(where: Location) -> tuple[str, ...]:
    """MedMNIST's own class names, by the file's name ("pathmnist.npz", "pathmnist_224.npz")."""
    flag = where.files[0].stem.split("_")[0].lower()
    try:
        from medmnist import INFO
    except ImportError:
        INFO = {}
    if flag not in INFO:
        raise ValueError(
            f"{where.name}: what are the classes called? "
            "Give class_names in the order of the labels"
            + (", or type: pip install medmnist" if flag.endswith("mnist") and not INFO else ".")
        )
    return tuple(INFO[flag]["label"].values())


def _id_of(record: object, form: Format) -> str | None:
    if not isinstance(record, dict):
        return None
    return next((str(record[key]) for key in form.id_keys if record.get(key) is not None), None)
