"""One record of a published dataset → `Row`: a function for each layout.

Each takes `(record, index, context)` and gives a `Row`, or None for a record that was not asked
for. `taken` splits a record into the fields that a layout uses and the rest, which becomes
`Row.extra`.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import cast

from moellava.data.rows import IMAGE_TOKEN, Role, Row, RowError, Turn
from moellava.images import PART_OPTIONS, ImageLike
from moellava.messages import unknown_name

Record = Mapping[str, object]

# LLaVA's words for who speaks, and those of chat templates.
ROLES: dict[str, Role] = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "system": "system",
}
# Med-MoE writes open and close.
ANSWER_TYPES = {"open": "OPEN", "closed": "CLOSED", "close": "CLOSED"}
_IMAGE_KEYS = ("path", "bytes", *PART_OPTIONS)
# Of the parquet files that we write: fields of any type, as one JSON text.
EXTRA_COLUMN = "extra_json"


@dataclass(frozen=True, kw_only=True)
class Context:
    """What a layout may need besides the record.

    Args:
        image_root: the folder that relative image paths start from.
        split: of rows that do not name theirs, as the file's name says it.
        only_split: leave out the rows of other splits.
        language: of SLAKE's rows, "en" or "zh"; None keeps both.
        class_names: of a classification set, in the order of the labels.
        question: of a classification set, in place of the default one.
        derive_answer_type: call an answer CLOSED if it is yes or no, else OPEN, if the source has
            no type.
    """

    image_root: Path = Path()
    split: str | None = None
    only_split: str | None = None
    language: str | None = None
    class_names: Sequence[str] = ()
    question: str | None = None
    derive_answer_type: bool = False


def llava(record: Record, index: int, context: Context) -> Row:
    """LLaVA, LLaVA-Med, Med-MoE; the key `conversatons` of their released files is accepted."""
    if "video" in record:
        raise RowError("it has a 'video'; only images are read")
    turns, rest = first_taken(record, "conversations", "conversatons")
    images, rest = first_taken(rest, "image", "images")
    source, rest = first_taken(rest, "source")
    choices, rest = first_taken(rest, "choices")
    extra, rest = first_taken(rest, EXTRA_COLUMN)
    if not isinstance(turns, list):
        raise RowError(f"'conversations' is {_kind(turns)}; expected a list of {{'from', 'value'}}")
    return row_of(
        rest | (_json_object(extra) if extra else {}),
        index,
        context,
        source=str(source or "llava"),
        images=images_of(images, context),
        turns=[_turn(turn, number, "from", "value") for number, turn in enumerate(turns)],
        choices=[str(choice) for choice in choices] if isinstance(choices, list) else (),
    )


def messages(record: Record, index: int, context: Context) -> Row:
    """Chat-template messages with string contents, and a column `images` (TRL, LLaMA-Factory)."""
    (turns,), rest = taken(record, "messages")
    images, rest = first_taken(rest, "images", "image")
    if not isinstance(turns, list):
        raise RowError(f"'messages' is {_kind(turns)}; expected a list of {{'role', 'content'}}")
    return row_of(
        rest,
        index,
        context,
        source="messages",
        images=images_of(images, context) or images_of(_images_in(turns), context),
        turns=[_turn(turn, number, "role", "content") for number, turn in enumerate(turns)],
    )


def questions(record: Record, index: int, context: Context) -> Row:
    """The question files of LLaVA's `model_vqa.py`: `question_id`, `image`, `text`; no answers."""
    (row_id, text), rest = taken(record, "question_id", "text")
    image, rest = first_taken(rest, "image")
    images = images_of(image, context)
    return row_of(
        rest | {"id": row_id},
        index,
        context,
        source="questions",
        images=images,
        turns=[asked(text_of(text, "text"), images)],
    )


def vqa(record: Record, index: int, context: Context, source: str = "vqa") -> Row:
    """Columns `image`, `question`, `answer`, as VQA-RAD and PathVQA have them on the hub."""
    (image, question, answer), rest = taken(record, "image", "question", "answer")
    return _question_and_answer(
        rest, index, context, source=source, image=image, question=question, answer=answer
    )


def path_vqa(record: Record, index: int, context: Context) -> Row:
    """PathVQA, as the hub has it."""
    return vqa(record, index, context, source="path_vqa")


def vqa_rad(record: Record, index: int, context: Context) -> Row:
    """VQA-RAD: the hub's columns, or the authors' JSON, whose phrase type tells the test rows."""
    if "phrase_type" not in record:
        return vqa(record, index, context, source="vqa_rad")
    (row_id, image, question, answer), rest = taken(
        record, "qid", "image_name", "question", "answer"
    )
    split = "test" if str(record["phrase_type"]).startswith("test") else "train"
    return _question_and_answer(
        rest | {"id": row_id, "split": split},
        index,
        context,
        source="vqa_rad",
        image=image,
        question=question,
        answer=answer,
    )


def slake(record: Record, index: int, context: Context) -> Row | None:
    """SLAKE: a row per question, in English or Chinese; images are `<img_name>` in `imgs`."""
    if context.language is not None and record["q_lang"] != context.language:
        return None
    (row_id, question, answer), rest = taken(record, "qid", "question", "answer")
    image, rest = first_taken(rest, "image")
    if image is None:
        (image,), rest = taken(rest, "img_name")
    return _question_and_answer(
        rest | {"id": row_id},
        index,
        context,
        source="slake",
        image=image,
        question=question,
        answer=answer,
    )


def classification(record: Record, index: int, context: Context) -> Row:
    """An image and its label (MedMNIST's arrays, image folders of the hub) as question and answer.

    A vector of zeros and ones is a multi-label target: the answer lists the names, or says "none of
    these".
    """
    (image, label), rest = taken(record, "image", "label")
    names = list(context.class_names)
    question = context.question or f"Which of these does the image show: {', '.join(names)}?"
    images = needed_images(image, context)
    return row_of(
        rest,
        index,
        context,
        source="classification",
        images=images,
        turns=[asked(question, images), Turn("assistant", _class_of(label, names))],
        choices=names,
    )


# -- for layouts of one's own, too


def taken(record: Record, *keys: str) -> tuple[list[object], dict[str, object]]:
    """The values of the keys, and the record without them.

    Raises:
        KeyError: a key is missing.
    """
    values = [record[key] for key in keys]
    return values, {key: value for key, value in record.items() if key not in keys}


def first_taken(record: Record, *keys: str) -> tuple[object, dict[str, object]]:
    """The value of the first key that has one, or None, and the record without any of the keys."""
    found = next((record[key] for key in keys if record.get(key) is not None), None)
    return found, {key: value for key, value in record.items() if key not in keys}


def row_of(
    rest: Record,
    index: int,
    context: Context,
    *,
    source: str,
    images: Sequence[ImageLike],
    turns: Sequence[Turn],
    choices: Sequence[str] = (),
) -> Row:
    """A row; of the fields that were not taken, `id`, `answer_type` and `split` are its own."""
    row_id, rest = first_taken(rest, "id")
    answer_type, rest = first_taken(rest, "answer_type")
    split, rest = first_taken(rest, "split")
    written = str(answer_type or "").strip()
    return Row(
        id=str(index if row_id is None else row_id),
        images=tuple(images),
        turns=tuple(turns),
        answer_type=ANSWER_TYPES.get(written.lower(), written) or None,
        source=source,
        split=str(split) if split else context.split,
        choices=tuple(choices),
        extra={key: value for key, value in rest.items() if value is not None},
    )


def asked(text: str, images: Sequence[ImageLike]) -> Turn:
    """The user's turn, with a mark for each image in front unless the text has its own."""
    if not text:
        raise RowError("the question is empty", kind="empty turn")
    if IMAGE_TOKEN in text:
        return Turn("user", text)
    return Turn("user", f"{IMAGE_TOKEN}\n" * len(images) + text)


def text_of(value: object, name: str) -> str:
    """A field that must be text."""
    if not isinstance(value, str):
        kind = "empty turn" if value is None else "malformed"
        raise RowError(f"{name} is {_kind(value)}; expected text", kind=kind)
    return value


def images_of(value: object, context: Context) -> tuple[ImageLike, ...]:
    """One image or a list of them: relative paths start at the image root.

    The hub's `{"bytes", "path"}` becomes its bytes. With options of `moellava.images.PartOptions`,
    such as `{"path": "ct_folder", "slices": 8}`, a mapping stays one, for
    `moellava.data.rows.with_parts`.
    """
    if value is None or (isinstance(value, str | list | tuple) and not value):
        return ()
    if isinstance(value, list | tuple):
        return tuple(image for item in value for image in images_of(item, context))
    if isinstance(value, Mapping):
        if unknown := [key for key in value if key not in _IMAGE_KEYS]:
            raise RowError(str(unknown_name("key of an image", str(unknown[0]), _IMAGE_KEYS)))
        options = {key: value[key] for key in PART_OPTIONS if value.get(key) is not None}
        if options:
            plain = {key: value.get(key) for key in ("bytes", "path")}
            (source,) = needed_images(plain, context)
            key = "bytes" if isinstance(source, bytes) else "path"
            return ({key: source, **options},)
        data = value.get("bytes")
        if isinstance(data, bytes):
            return (data,)
        value = value.get("path")
        if value is None:
            raise RowError("an image is empty: it has neither bytes nor a path")
    if isinstance(value, str):
        return (str(context.image_root / value),)
    if isinstance(value, int | float | Mapping | list | tuple):
        raise RowError(f"an image is {_kind(value)}; expected a path")
    return (cast(ImageLike, value),)


def needed_images(value: object, context: Context) -> tuple[ImageLike, ...]:
    """The same, of a row that must have an image."""
    images = images_of(value, context)
    if not images:
        raise RowError("it has no image")
    return images


def _question_and_answer(
    rest: Record,
    index: int,
    context: Context,
    *,
    source: str,
    image: object,
    question: object,
    answer: object,
) -> Row:
    images = needed_images(image, context)
    # The authors' VQA-RAD file has numbers among its answers.
    if isinstance(answer, int | float) and not isinstance(answer, bool):
        answer = str(answer)
    reply = Turn("assistant", text_of(answer, "answer").strip())
    turns = [asked(text_of(question, "question").strip(), images), reply]
    if not reply.text:
        raise RowError("the answer is empty", kind="empty turn")
    if context.derive_answer_type and rest.get("answer_type") is None:
        derived = "CLOSED" if reply.text.lower() in ("yes", "no") else "OPEN"
        rest = {**rest, "answer_type": derived}
    return row_of(rest, index, context, source=source, images=images, turns=turns)


def _class_of(label: object, names: Sequence[str]) -> str:
    if isinstance(label, list | tuple):
        if len(label) != len(names):
            raise RowError(f"{len(label)} labels for {len(names)} class names {names}")
        found = [name for name, is_on in zip(names, label, strict=True) if is_on]
        return ", ".join(found) or "none of these"
    if not isinstance(label, int) or not 0 <= label < len(names):
        raise RowError(
            f"the label is {label!r}; expected 0 to {len(names) - 1}, since the classes are {names}"
        )
    return names[label]


def _turn(turn: object, number: int, role_key: str, text_key: str) -> Turn:
    if not isinstance(turn, Mapping):
        raise RowError(f"turn {number} is {_kind(turn)}; expected {{{role_key!r}, {text_key!r}}}")
    for key in (role_key, text_key):
        if key not in turn:
            raise RowError(f"turn {number} has no {key!r}; it has {sorted(turn)}")
    role = turn[role_key]
    if not isinstance(role, str) or role not in ROLES:
        raise RowError(f"turn {number} is from {role!r}; expected one of {', '.join(ROLES)}")
    return Turn(ROLES[role], _content_of(turn[text_key], f"{text_key!r} of turn {number}"))


def _content_of(content: object, name: str) -> str:
    """Text, or a chat template's list of texts and images, whose images become marks."""
    if not isinstance(content, list | tuple):
        return text_of(content, name)
    parts = []
    for item in content:
        kind = item.get("type") if isinstance(item, Mapping) else None
        if kind == "image":
            parts.append(f"{IMAGE_TOKEN}\n")
        elif kind == "text" and isinstance(item, Mapping):
            parts.append(text_of(item.get("text"), f"a text in {name}"))
        else:
            raise RowError(f"{name} has an item that is not of the type text or image")
    return "".join(parts)


def _json_object(text: object) -> dict[str, object]:
    try:
        content = json.loads(str(text))
    except ValueError as error:
        raise RowError(f"{EXTRA_COLUMN!r} is not JSON: {error}") from error
    if not isinstance(content, dict):
        raise RowError(f"{EXTRA_COLUMN!r} holds {_kind(content)}; expected an object")
    return content


def _images_in(turns: object) -> list[object]:
    """What the image items of content lists hold, if they hold it."""
    contents = (
        [turn.get("content") for turn in turns if isinstance(turn, Mapping)]
        if (isinstance(turns, list))
        else []
    )
    items = [item for content in contents if isinstance(content, list) for item in content]
    found = [
        item.get("image") or item.get("path")
        for item in items
        if isinstance(item, Mapping) and item.get("type") == "image"
    ]
    return [image for image in found if image is not None]


def _kind(value: object) -> str:
    return "missing" if value is None else f"a {type(value).__name__}"
