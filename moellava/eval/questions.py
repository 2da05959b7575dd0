"""Rows of any data set → what is asked and true: `questions_of`, a `Question` per answer."""

import hashlib
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from moellava.data.rows import IMAGE_TOKEN, Row, Turn
from moellava.eval.answer_types import decide_answer_type
from moellava.eval.predictions import GROUP_KEYS
from moellava.eval.scorers.registry import AnswerType
from moellava.images import ImagePart
from moellava.messages import unknown_name

# A value of a data set's own field that is a group.
_Scalar = str | int | float | bool


@dataclass(frozen=True, kw_only=True)
class Question:
    """One answer that a model owes.

    Args:
        id: the row's; a later turn of the row adds its number, "row7#2".
        turns: the conversation up to the question, the true answers of earlier turns included.
        row_number: where the row stands, to find its images, which are not kept.
        image_names: a name for each image of these turns, the same wherever the image stands.
        text: the question without its image marks.
    """

    id: str
    turns: tuple[Turn, ...]
    row_number: int
    image_names: tuple[str, ...]
    text: str
    truth: str
    answer_type: AnswerType
    answer_type_from: str
    options: tuple[str, ...]
    groups: dict[str, str]


def questions_of(
    rows: Sequence[Row], *, root: Path | None = None, group_by: Sequence[str] | None = None
) -> Iterator[Question]:
    """The questions of rows, in order; a row without an answer has none.

    Args:
        root: the folder that image names leave out.
        group_by: fields of the rows that are groups; by default those of `GROUP_KEYS`.
    """
    repeated = {row_id for row_id, count in Counter(row.id for row in rows).items() if count > 1}
    for number, row in enumerate(rows):
        row_id = f"{row.id}@{number}" if row.id in repeated else row.id
        yield from _questions(
            row, row_id, number, root, GROUP_KEYS if group_by is None else group_by
        )


def known_groups(rows: Sequence[Row], group_by: Sequence[str]) -> None:
    """Raise `ValueError` for a group that no row has; the nearest field is suggested."""
    known: set[str] = set()
    for row in rows:
        known |= {name for name, value in row.extra.items() if isinstance(value, _Scalar)}
        if known.issuperset(group_by):
            return
    raise unknown_name("group", next(name for name in group_by if name not in known), known)


def image_name(image: object, root: Path | None = None) -> str:
    """The path of an image, or a hash of its content, which tells it from others."""
    if isinstance(image, ImagePart):
        return f"{image_name(image.source, root)}{image.suffix}"
    if isinstance(image, str | Path):
        path = Path(image)
        is_inside = root is not None and path.is_relative_to(root)
        return (path.relative_to(root) if is_inside and root is not None else path).as_posix()
    if isinstance(image, bytes):
        return f"sha256:{hashlib.sha256(image).hexdigest()[:16]}"
    pixels = np.ascontiguousarray(np.asarray(image))
    head = f"{getattr(image, 'mode', '')} {pixels.shape} {pixels.dtype}".encode()
    return f"sha256:{hashlib.sha256(head + pixels.tobytes()).hexdigest()[:16]}"


def _questions(
    row: Row, row_id: str, row_number: int, root: Path | None, group_by: Sequence[str]
) -> Iterator[Question]:
    names = tuple(image_name(image, root) for image in row.images)
    groups = {
        name: str(row.extra[name]).strip()
        for name in group_by
        if isinstance(row.extra.get(name), _Scalar) and str(row.extra[name]).strip()
    }
    number = 0
    for place, turn in enumerate(row.turns):
        if turn.role != "assistant":
            continue
        number += 1
        before = row.turns[:place]
        num_images = sum(one.text.count(IMAGE_TOKEN) for one in before)
        answer_type, decided_by = decide_answer_type(
            row.answer_type if number == 1 else None, turn.text, row.choices if number == 1 else ()
        )
        yield Question(
            id=row_id if number == 1 else f"{row_id}#{number}",
            turns=before,
            row_number=row_number,
            image_names=names[:num_images],
            text=before[-1].text.replace(IMAGE_TOKEN, "").strip(),
            truth=turn.text,
            answer_type=answer_type,
            answer_type_from=decided_by,
            options=row.choices if number == 1 else (),
            groups=groups,
        )
