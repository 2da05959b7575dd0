"""One row of any dataset: `Row` with its images and `Turn`s; `RowError` says what is wrong."""

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, cast

from moellava.images import PART_OPTIONS, ImageLike, ImagePart, image_parts, with_words

IMAGE_TOKEN = "<image>"

Role = Literal["system", "user", "assistant"]


@dataclass(frozen=True)
class Turn:
    """What one side says; `<image>` may stand anywhere in a user's text and keeps its place."""

    role: Role
    text: str


@dataclass(frozen=True, kw_only=True, repr=False)
class Row:
    """A conversation about images, whatever dataset it came from.

    Args:
        id: the source's own, or the row's number.
        images: in the order of their `<image>` marks; each one anything that
            `moellava.images.load_image` reads: a path, encoded bytes, an array, a PIL image.
            They are not decoded yet.
        turns: user and assistant in turns, after an optional system turn.
        answer_type: "OPEN" or "CLOSED" if the source says so (in any spelling), another word as
            the source has it, None if the source has none.
        source: the name of the format, such as "slake".
        split: such as "train", if it is known.
        choices: the options of a multiple-choice question, without their letters.
        extra: every other field of the source, unchanged.
    """

    id: str
    images: tuple[ImageLike, ...]
    turns: tuple[Turn, ...]
    answer_type: str | None = None
    source: str = ""
    split: str | None = None
    choices: tuple[str, ...] = ()
    extra: Mapping[str, object] = field(default_factory=dict)

    def __repr__(self) -> str:
        shown = [
            f"<{len(image)} bytes>" if isinstance(image, bytes) else repr(image)
            for image in self.images
        ]
        images = {"images": f"({', '.join(shown)})"}
        told = {
            name: repr(value) for name, value in vars(self).items() if name != "images" and value
        }
        return f"Row({', '.join(f'{name}={text}' for name, text in (images | told).items())})"

    @property
    def question(self) -> str:
        """The first user turn without its image marks."""
        text = next((turn.text for turn in self.turns if turn.role == "user"), "")
        return text.replace(IMAGE_TOKEN, "").strip()

    @property
    def answer(self) -> str | None:
        """The first assistant turn; None if the row only asks."""
        return next((turn.text for turn in self.turns if turn.role == "assistant"), None)

    def messages(self) -> list[dict[str, object]]:
        """The row as messages of a chat template, each image at the place of its mark.

        The templates write a newline behind each image, so the newline behind a mark is not written
        twice.
        """
        images = iter(self.images)
        return [{"role": turn.role, "content": _content(turn.text, images)} for turn in self.turns]


class RowError(ValueError):
    """A row that cannot be used: where it stands and what is wrong with it.

    Attributes:
        kind: "malformed", "empty turn", "placeholder mismatch" or "unreadable image".
        reason: what was found and what was expected, without the place.
    """

    def __init__(self, reason: str, *, kind: str = "malformed", place: str = "") -> None:
        super().__init__(f"{place}: {reason}" if place else reason)
        self.kind, self.reason = kind, reason

    def at(self, source: str | Path, index: int, row_id: str | None) -> "RowError":
        """The same error with its place: file, number (from 0) and id of the row."""
        named = f" (id {row_id!r})" if row_id is not None else ""
        return RowError(self.reason, kind=self.kind, place=f"{source}, row {index}{named}")


def with_parts(row: Row) -> Row:
    """The row with the pictures that its images stand for, each at its mark behind its words.

    An image with options, `{"path": "ct_folder", "slices": 8}`, becomes its parts, see
    `moellava.images.image_parts`; only headers are read.

    Raises:
        RowError: options that do not go with the image, or a file that cannot be read.
    """
    if not any(isinstance(image, Mapping) for image in row.images):
        return row
    if sum(turn.text.count(IMAGE_TOKEN) for turn in row.turns) != len(row.images):
        return row  # an error of `checked`
    found: list[ImageLike] = []
    marks: list[str] = []
    for image in row.images:
        if not isinstance(image, Mapping):
            found.append(image)
            marks.append(IMAGE_TOKEN)
            continue
        try:
            items = _parts(image)
        except (OSError, ValueError) as error:
            raise RowError(str(error), kind="unreadable image") from error
        found += [item for item in items if not isinstance(item, str)]
        words = [item if isinstance(item, str) else f"{IMAGE_TOKEN}\n" for item in items]
        marks.append("".join(words).removesuffix("\n"))
    waiting = iter(marks)
    turns = tuple(
        replace(turn, text=re.sub(re.escape(IMAGE_TOKEN), lambda _: next(waiting), turn.text))
        for turn in row.turns
    )
    return replace(row, images=tuple(found), turns=turns)


def checked(row: Row) -> Row:
    """The row itself, if it can be used.

    Raises:
        RowError: a blank turn, turns out of order, or another number of `<image>` marks than of
            images.
    """
    spoken = [turn for turn in row.turns if turn.role != "system"]
    if not spoken:
        raise RowError("it has no turns; expected a user turn at least")
    for number, turn in enumerate(row.turns):
        if not turn.text.strip():  # an image alone may be a turn
            raise RowError(f"turn {number} ({turn.role}) is empty", kind="empty turn")
        if not is_text(turn.text):
            raise RowError(f"turn {number} ({turn.role}) has half of a surrogate pair, not text")
        if turn.role != "user" and IMAGE_TOKEN in turn.text:
            raise RowError(
                f"turn {number} ({turn.role}) has {IMAGE_TOKEN}; only user turns may",
                kind="placeholder mismatch",
            )
        if turn.role == "system" and number:
            raise RowError(f"turn {number} is a system turn; only the first may be")
    for number, turn in enumerate(spoken):
        expected = ("user", "assistant")[number % 2]
        if turn.role != expected:
            raise RowError(
                f"user and assistant must take turns, but {turn.role} comes where {expected} should"
            )
    num_marks = sum(turn.text.count(IMAGE_TOKEN) for turn in row.turns)
    if num_marks != len(row.images):
        raise RowError(
            f"{num_marks} {IMAGE_TOKEN} marks for {len(row.images)} images; "
            "expected as many marks as images",
            kind="placeholder mismatch",
        )
    return row


def is_text(text: str) -> bool:
    """Whether a string can be written as UTF-8; JSON can spell strings that cannot."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _content(text: str, images: Iterator[ImageLike]) -> str | list[dict[str, object]]:
    if IMAGE_TOKEN not in text:
        return text
    items: list[dict[str, object]] = []
    for part in re.split(f"({re.escape(IMAGE_TOKEN)}\n?)", text):
        if part.startswith(IMAGE_TOKEN):
            items.append({"type": "image", "image": next(images)})
        elif part:
            items.append({"type": "text", "text": part})
    return items


def _parts(image: Mapping[str, object]) -> list[str | ImagePart]:
    options: Any = {name: value for name, value in image.items() if name in PART_OPTIONS}
    source = image["path"] if image.get("bytes") is None else image["bytes"]
    return with_words(image_parts(cast(ImageLike, source), **options))
