"""The rows of an evaluation and what is asked about them: `read_evaluation_data`."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path

from PIL import Image

from moellava.data.readers import Rows, read_rows
from moellava.data.rows import Row
from moellava.eval.baselines import BLANK
from moellava.eval.questions import Question, known_groups, questions_of
from moellava.images import load_image

DataSource = str | Path | Sequence[Row]

_BLANK_SIZE = (64, 64)


@dataclass
class EvaluationData:
    """The rows, and what is asked about them; an image is read when it is needed."""

    rows: Sequence[Row]
    name: str
    root: Path | None
    questions: list[Question]
    without_truth: list[str]
    places: dict[str, tuple[int, int]] = field(default_factory=dict)  # image → row, number there

    def __post_init__(self) -> None:
        for question in self.questions:
            for number, name in enumerate(question.image_names):
                self.places.setdefault(name, (question.row_number, number))

    def load(self, name: str) -> Image.Image:
        """The picture of an image name."""
        if name == BLANK:
            return Image.new("RGB", _BLANK_SIZE)
        row, number = self.places[name]
        return load_image(self.rows[row].images[number])

    def fingerprint(self) -> str:
        """SHA-256 over the questions, truths and image names."""
        digest = hashlib.sha256()
        for one in self.questions:
            turns = [(turn.role, turn.text) for turn in one.turns]
            told = (one.id, turns, one.truth, one.answer_type, one.options, one.image_names)
            digest.update(repr(told).encode())
        return digest.hexdigest()


def read_evaluation_data(
    data: DataSource,
    *,
    split: str | None = None,
    images: str | Path | None = None,
    language: str | None = None,
    class_names: Sequence[str] | None = None,
    group_by: Sequence[str] | None = None,
    limit: int | None = None,
) -> EvaluationData:
    """Read rows and make questions of those that have an answer.

    Args:
        data: what `read_rows` reads, or rows.
        split, images, language, class_names: of data that is read, see `read_rows`.
        group_by: fields of the rows that are groups; by default those that are known.
        limit: how many questions; all if left out.

    Raises:
        ValueError: no row has an answer, or none has a field of `group_by`.
    """
    rows = rows_of(data, split=split, images=images, language=language, class_names=class_names)
    root = rows.image_root if isinstance(rows, Rows) else None
    name = rows.source if isinstance(rows, Rows) else f"{len(rows)} rows"
    if group_by is not None:
        known_groups(rows, group_by)
    questions = list(islice(questions_of(rows, root=root, group_by=group_by), limit))
    without = [row.id for row in rows if row.answer is None]
    if not questions:
        raise ValueError(
            f"{name}: none of {len(rows)} rows has an answer to compare with. Give data that has."
        )
    return EvaluationData(rows, name, root, questions, without)


def rows_of(data: DataSource, **options: object) -> Sequence[Row]:
    """Rows as they are, or those that `read_rows` reads with the options."""
    if not isinstance(data, str | Path):
        return data
    return read_rows(data, **options)  # type: ignore[arg-type]  # each option has its own type
