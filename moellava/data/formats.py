"""One record of a published dataset → `Row`: a function per layout, and the table `FORMATS` that tells them apart."""

import json
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from moellava.data.rows import IMAGE_TOKEN, Role, Row, RowError, Turn

# LLaVA's words for who speaks, and those of chat templates.
ROLES: dict[str, Role] = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "system": "system",
}
ANSWER_TYPES = {
    "open": "OPEN",
    "closed": "CLOSED",
    "close": "CLOSED",
}  # Med-MoE writes open and close
EXTRA_COLUMN = (
    "extra_json"  # of the parquet files that we write: fields of any type, as one JSON text
)
PMC_VQA_PROMPT = "Answer with the option's letter from the given choices directly."


@dataclass(frozen=True, kw_only=True)
class Context:
    """What a format may need besides the record.

    Args:
        image_root: the folder that relative image paths start from.
        split: of rows that do not name theirs, as the file's name says it.
        only_split: leave out the rows of other splits.
        language: of SLAKE's rows, "en" or "zh"; None keeps both.
        class_names: of a classification set, in the order of the labels.
        question: of a classification set, in place of the default one.
        derive_answer_type: call an answer CLOSED if it is yes or no, else OPEN, where the source has no type.
    """

    image_root: Path = Path()
    split: str | None = None
    only_split: str | None = None
    language: str | None = None
    class_names: Sequence[str] = ()
    question: str | None = None
    derive_answer_type: bool = False


ToRow = Callable[[Mapping[str, Any], int, Context], Row | None]


@dataclass(frozen=True, kw_only=True)
class Format:
    """One layout: its name, how its columns (and the name of its file or repo) show it, and the way to a `Row`.

    `to_row(record, index, context)` returns None for a record that the user did not ask for (another split or
    language), and raises `RowError` or `KeyError` for one that is broken.
    """

    name: str
    to_row: ToRow
    matches: Callable[[Collection[str], str], bool]
    image_folders: tuple[str, ...] = ()  # where its images lie, seen from the file
    archives: tuple[str, ...] = field(default=())  # the archives that hold them


def llava(record: Mapping[str, Any], index: int, context: Context) -> Row:
    """LLaVA, LLaVA-Med, Med-MoE; the key `conversatons` of their released files is accepted."""
    rest = dict(record)
    if "video" in rest:
        raise RowError("it has a 'video'; only images are read")
    key = "conversations" if rest.get("conversations") is not None else "conversatons"
    turns = rest.pop(key, None)
    rest.pop("conversations", None)
    if not isinstance(turns, list):
        raise RowError(f"'conversations' is {_kind(turns)}; expected a list of {{'from', 'value'}}")
    images = rest.pop("image", None) if rest.get("image") is not None else rest.pop("images", None)
    rest.pop("image", None)
    rest |= json.loads(rest.pop(EXTRA_COLUMN, None) or "{}")
    return _row(
        rest,
        index,
        context,
        source=rest.pop("source", None) or "llava",
        images=_images(images, context),
        turns=tuple(_turn(turn, number, "from", "value") for number, turn in enumerate(turns)),
        choices=tuple(rest.pop("choices", None) or ()),
    )


def messages(record: Mapping[str, Any], index: int, context: Context) -> Row:
    """Chat-template messages with string contents, and a column `images` (TRL, LLaMA-Factory)."""
    rest = dict(record)
    turns = rest.pop("messages")
    if not isinstance(turns, list):
        raise RowError(f"'messages' is {_kind(turns)}; expected a list of {{'role', 'content'}}")
    images = rest.pop("images", None) if rest.get("images") is not None else rest.pop("image", None)
    return _row(
        rest,
        index,
        context,
        source="messages",
        images=_images(images, context),
        turns=tuple(_turn(turn, number, "role", "content") for number, turn in enumerate(turns)),
    )


def questions(record: Mapping[str, Any], index: int, context: Context) -> Row:
    """The question files of LLaVA's `model_vqa.py`: `question_id`, `image`, `text`; no answers."""
    rest = dict(record)
    rest["id"] = rest.pop("question_id")
    images = _images(rest.pop("image", None), context)
    text = _text(rest.pop("text"), "text")
    return _row(
        rest, index, context, source="questions", images=images, turns=(_ask(text, images),)
    )


def vqa(record: Mapping[str, Any], index: int, context: Context, source: str = "vqa") -> Row:
    """Columns `image`, `question`, `answer`, as VQA-RAD and PathVQA have them on the hub."""
    rest = dict(record)
    return _question_and_answer(
        rest, index, context, source, rest.pop("image"), rest.pop("question"), rest.pop("answer")
    )


def path_vqa(record: Mapping[str, Any], index: int, context: Context) -> Row:
    return vqa(record, index, context, source="path_vqa")


def vqa_rad(record: Mapping[str, Any], index: int, context: Context) -> Row | None:
    """VQA-RAD: the hub's columns, or the authors' JSON, whose phrase type tells the test rows."""
    if "phrase_type" not in record:
        return vqa(record, index, context, source="vqa_rad")
    rest = dict(record)
    rest["split"] = "test" if str(rest["phrase_type"]).startswith("test") else "train"
    rest["id"] = rest.pop("qid")
    return _question_and_answer(
        rest,
        index,
        context,
        "vqa_rad",
        rest.pop("image_name"),
        rest.pop("question"),
        rest.pop("answer"),
    )


def slake(record: Mapping[str, Any], index: int, context: Context) -> Row | None:
    """SLAKE: a row per question, in English or Chinese; images are `<img_name>` in the folder `imgs`."""
    if context.language is not None and record["q_lang"] != context.language:
        return None
    rest = dict(record)
    rest["id"] = rest.pop("qid")
    image = rest.pop("image", None)
    image = rest.pop("img_name") if image is None else image
    return _question_and_answer(
        rest, index, context, "slake", image, rest.pop("question"), rest.pop("answer")
    )


def pmc_vqa(record: Mapping[str, Any], index: int, context: Context) -> Row | None:
    """PMC-VQA: four choices; the answer is the letter (`Answer_label` in version 1, `Answer` in version 2).

    Columns of version 1, as its card shows: Figure_path, Question, Answer, Choice A to D, Answer_label; of version 2,
    as the code of its users reads: index, Figure_path, Caption, Question, Choice A to D, Answer, split.
    """
    rest = dict(record)
    letters = "ABCD"
    texts = [_text(rest.pop(f"Choice {letter}"), f"Choice {letter}").strip() for letter in letters]
    choices = tuple(
        text.removeprefix(f"{letter}:").strip() for letter, text in zip(letters, texts, strict=True)
    )  # written " A:text "
    rest["id"] = rest.pop("index", None)
    question = _text(rest.pop("Question"), "Question").strip()
    label = str(rest.pop("Answer_label", None) or rest["Answer"]).strip()
    if label not in tuple(letters):
        raise RowError(f"the answer is {label!r}; expected one of the letters {', '.join(letters)}")
    lines = [
        question,
        *(f"{letter}: {choice}" for letter, choice in zip(letters, choices, strict=True)),
    ]
    if rest["Answer"] == label:
        rest.pop("Answer")
    images = _needed_images(rest.pop("Figure_path"), context)
    turns = (_ask("\n".join([*lines, PMC_VQA_PROMPT]), images), Turn("assistant", label))
    return _row(rest, index, context, source="pmc_vqa", images=images, turns=turns, choices=choices)


def classification(record: Mapping[str, Any], index: int, context: Context) -> Row:
    """An image and its label (MedMNIST's arrays, image folders of the hub) as a question with its answer.

    A vector of zeros and ones is a multi-label target: the answer lists the names, or says "none of these".
    """
    rest = dict(record)
    label = rest.pop("label")
    names = list(context.class_names)
    asked = context.question or f"Which of these does the image show: {', '.join(names)}?"
    if isinstance(label, (list, tuple)):
        if len(label) != len(names):
            raise RowError(f"{len(label)} labels for {len(names)} class names {names}")
        answer = (
            ", ".join(name for name, is_on in zip(names, label, strict=True) if is_on)
            or "none of these"
        )
    else:
        if not isinstance(label, int) or not 0 <= label < len(names):
            raise RowError(
                f"the label is {label!r}; expected 0 to {len(names) - 1}, since the classes are {names}"
            )
        answer = names[label]
    images = _needed_images(rest.pop("image"), context)
    turns = (_ask(asked, images), Turn("assistant", answer))
    return _row(
        rest,
        index,
        context,
        source="classification",
        images=images,
        turns=turns,
        choices=tuple(names),
    )


FORMATS: list[
    Format
] = [  # the first match wins, so layouts with telling columns stand before plain ones
    Format(
        name="slake",
        to_row=slake,
        matches=lambda columns, name: {"question", "answer", "q_lang", "qid"} <= set(columns),
        image_folders=("imgs",),
        archives=("imgs.zip",),
    ),
    Format(
        name="pmc_vqa",
        to_row=pmc_vqa,
        matches=lambda columns, name: (
            {"Figure_path", "Question", "Answer", "Choice A"} <= set(columns)
        ),
        image_folders=("images", "figures", "images_2/figures", "images_2"),
        archives=("images.zip", "images_2.zip"),
    ),
    Format(
        name="vqa_rad",
        to_row=vqa_rad,
        matches=lambda columns, name: (
            {"image_name", "question", "answer", "phrase_type"} <= set(columns)
            or ({"image", "question", "answer"} <= set(columns) and "rad" in name)
        ),
        image_folders=("VQA_RAD Image Folder", "images"),
    ),
    Format(
        name="path_vqa",
        to_row=path_vqa,
        matches=lambda columns, name: (
            {"image", "question", "answer"} <= set(columns) and "path" in name
        ),
        image_folders=("images",),
    ),
    Format(
        name="llava",
        to_row=llava,
        matches=lambda columns, name: "conversations" in columns or "conversatons" in columns,
        image_folders=("images",),
    ),
    Format(
        name="messages",
        to_row=messages,
        matches=lambda columns, name: "messages" in columns,
        image_folders=("images",),
    ),
    Format(
        name="questions",
        to_row=questions,
        matches=lambda columns, name: {"question_id", "text"} <= set(columns),
        image_folders=("images",),
    ),
    Format(
        name="vqa",
        to_row=vqa,
        matches=lambda columns, name: {"image", "question", "answer"} <= set(columns),
        image_folders=("images",),
    ),
    Format(
        name="classification",
        to_row=classification,
        matches=lambda columns, name: {"image", "label"} <= set(columns),
    ),
]


def _question_and_answer(
    rest: dict[str, Any],
    index: int,
    context: Context,
    source: str,
    image: Any,
    question: Any,
    answer: Any,
) -> Row:
    images = _needed_images(image, context)
    # The authors' VQA-RAD file has numbers among its answers.
    answer = (
        str(answer) if isinstance(answer, (int, float)) and not isinstance(answer, bool) else answer
    )
    turns = (
        _ask(_text(question, "question").strip(), images),
        Turn("assistant", _text(answer, "answer").strip()),
    )
    if not turns[1].text:
        raise RowError("the answer is empty", kind="empty turn")
    if context.derive_answer_type and rest.get("answer_type") is None:
        rest["answer_type"] = "CLOSED" if turns[1].text.lower() in ("yes", "no") else "OPEN"
    return _row(rest, index, context, source=source, images=images, turns=turns)


def _row(rest: dict[str, Any], index: int, context: Context, **fields: Any) -> Row:
    row_id = rest.pop("id", None)
    answer_type = rest.pop("answer_type", None)
    if answer_type is not None:
        answer_type = str(answer_type).strip()
        answer_type = ANSWER_TYPES.get(answer_type.lower(), answer_type) or None
    return Row(
        id=str(index if row_id is None else row_id),
        answer_type=answer_type,
        split=rest.pop("split", None) or context.split,
        extra={key: value for key, value in rest.items() if value is not None},
        **fields,
    )


def _ask(text: str, images: Sequence[Any]) -> Turn:
    if not text:
        raise RowError("the question is empty", kind="empty turn")
    if IMAGE_TOKEN in text:
        return Turn("user", text)
    return Turn("user", f"{IMAGE_TOKEN}\n" * len(images) + text)


def _turn(turn: Any, number: int, role_key: str, text_key: str) -> Turn:
    if not isinstance(turn, Mapping):
        raise RowError(f"turn {number} is {_kind(turn)}; expected {{{role_key!r}, {text_key!r}}}")
    for key in (role_key, text_key):
        if key not in turn:
            raise RowError(f"turn {number} has no {key!r}; it has {sorted(turn)}")
    role = turn[role_key]
    if role not in ROLES:
        raise RowError(f"turn {number} is from {role!r}; expected one of {', '.join(ROLES)}")
    return Turn(ROLES[role], _text(turn[text_key], f"{text_key!r} of turn {number}"))


def _text(value: Any, name: str) -> str:
    if not isinstance(value, str):
        raise RowError(
            f"{name} is {_kind(value)}; expected text",
            kind="empty turn" if value is None else "malformed",
        )
    return value


def _images(value: Any, context: Context) -> tuple[Any, ...]:
    """One image or a list: relative paths start at the image root; the hub's `{"bytes", "path"}` becomes its bytes."""
    if value is None or (isinstance(value, (str, list, tuple)) and not value):
        return ()
    if isinstance(value, (list, tuple)):
        return tuple(image for item in value for image in _images(item, context))
    if isinstance(value, Mapping):
        if value.get("bytes") is not None:
            return (value["bytes"],)
        value = value.get("path")
        if value is None:
            raise RowError("an image is empty: it has neither bytes nor a path")
    if isinstance(value, str):
        return (str(context.image_root / value),)
    if isinstance(value, (int, float, bool)):
        raise RowError(f"an image is {_kind(value)}; expected a path")
    return (value,)


def _needed_images(value: Any, context: Context) -> tuple[Any, ...]:
    images = _images(value, context)
    if not images:
        raise RowError("it has no image")
    return images


def _kind(value: Any) -> str:
    return "missing" if value is None else f"a {type(value).__name__}"
