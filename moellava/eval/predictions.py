"""Answers of any model as `Prediction`s: `read_predictions` reads three layouts, others by keys.

The layout of our own `predictions.jsonl` is the fields of `Prediction`, one JSON object a line.
"""

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path

from moellava.eval.answer_types import decide_answer_type
from moellava.eval.scorers.registry import AnswerType
from moellava.messages import unknown_name
from moellava.storage.errors import reading

# What a data set may say about a question, taken as groups if present.
GROUP_KEYS = (
    "dataset",
    "modality",
    "modality_type",
    "location",
    "image_organ",
    "content_type",
    "question_type",
    "phrase_type",
    "q_lang",
)


@dataclass(frozen=True, kw_only=True, slots=True)
class Prediction:
    """One question with its answer and truth.

    Args:
        id: of the row; a later turn of a conversation adds its number, "row7#2".
        images: names (a path, or a hash of the content), which tell rows of one image.
        prompt: the name of the prompt, see `moellava.eval.prompts`.
        answer_type_from: how the type was decided, see `decide_answer_type`.
        groups: such as modality → CT.
        num_tokens: of the answer; None if it is not known, like all that follow.
        is_cut: whether the answer reached the most new tokens before it ended.
        num_images_seen: images that the model was given.
        probabilities: of the stated options (or yes and no) at the answer's first position.
    """

    id: str
    images: tuple[str, ...] = ()
    question: str = ""
    prompt: str = "none"
    answer: str
    truth: str
    answer_type: AnswerType
    answer_type_from: str
    options: tuple[str, ...] = ()
    groups: Mapping[str, str] = field(default_factory=dict)
    num_tokens: int | None = None
    seconds: float | None = None
    is_cut: bool | None = None
    num_images_seen: int | None = None
    probabilities: Mapping[str, float] | None = None

    def as_line(self) -> str:
        """One line of `predictions.jsonl`, without its newline."""
        record = {name: getattr(self, name) for name in FIELDS}  # asdict copies, and takes longer
        return json.dumps(record, ensure_ascii=False)


FIELDS = tuple(item.name for item in fields(Prediction))

# Names of the fields in other layouts; a dot goes into an object, a number into a list.
_LLAVA = {"id": "question_id", "question": "prompt", "answer": "text"}
_LMMS_EVAL = {
    "id": "doc_id",
    "answer": "filtered_resps.0",
    "truth": "target",
    "question": "doc.question",
    "answer_type": "doc.answer_type",
    "images": "doc.img_name",
    "groups": "doc",
}
Record = Mapping[str, object]


@dataclass(frozen=True, kw_only=True, slots=True)
class Answer:
    """What a line says; a truth or type that it lacks comes from the data."""

    id: str
    answer: str
    fields: Mapping[str, object]  # those of `Prediction` that the line has besides

    def joined(self, known: Mapping[str, object]) -> Prediction:
        """The prediction, with what the data knows in place of what the line says.

        Raises:
            ValueError: neither has a truth.
        """
        said = {**self.fields, **known}
        truth = said.get("truth")
        if truth is None:
            raise ValueError(
                f"The prediction for {self.id!r} has no truth. Give the data that was asked, "
                "--data DATA, or name the key that holds it, --keys truth=KEY."
            )
        return _prediction(self.id, self.answer, str(truth), said)


def read_predictions(
    path: str | Path, keys: Mapping[str, str] | None = None
) -> Iterator[Prediction]:
    """The predictions of a file whose lines have truths; see `read_answers`."""
    return (answer.joined({}) for answer in read_answers(path, keys))


def read_answers(path: str | Path, keys: Mapping[str, str] | None = None) -> Iterator[Answer]:
    """Read one line after the other: our own layout, LLaVA's answers, lmms-eval's samples.

    Args:
        path: a file of JSON lines, or of one JSON list.
        keys: field of `Prediction` → key of the file, for any other layout, such as
            `{"answer": "model_output", "truth": "reference.text"}`; a dot goes into an object.

    Raises:
        ValueError: a line that is not a JSON object, or lacks the id or the answer; file and line
            are named.
    """
    for name in keys or {}:
        if name not in FIELDS:
            raise unknown_name("field of a prediction", name, FIELDS)
    layout: Mapping[str, str] | None = None
    for number, record in _records(Path(path)):
        if layout is None:
            layout = {**_layout(record), **(keys or {})}
        yield _answer(record, layout, f"{path}, line {number}")


def _records(path: Path) -> Iterator[tuple[int, Record]]:
    with reading(path, "predictions"), path.open(encoding="utf-8-sig") as file:
        if file.read(1) == "[":
            file.seek(0)
            lines: Iterator[object] = iter(json.load(file))
        else:
            file.seek(0)
            lines = (_parse(line, path, at) for at, line in enumerate(file, 1) if line.strip())
        for number, record in enumerate(lines, start=1):
            if not isinstance(record, dict):
                kind = type(record).__name__
                raise ValueError(f"{path}, line {number} is a {kind}; expected an object")
            yield number, record


def _parse(line: str, path: Path, number: int) -> object:
    try:
        return json.loads(line)
    except json.JSONDecodeError as error:
        raise ValueError(f"{path}, line {number} is not JSON: {error}") from error


def _layout(record: Record) -> dict[str, str]:
    """Told by the keys of the first line."""
    if "filtered_resps" in record:
        # In a file it is the one answer; in memory, and beside others, a list.
        is_text = isinstance(record["filtered_resps"], str)
        return {
            **_LMMS_EVAL,
            "answer": "filtered_resps" if is_text else "filtered_resps.0",
            "question": "doc.question" if "doc" in record else "input",
        }
    if "question_id" in record and "text" in record:
        return _LLAVA
    return {name: name for name in FIELDS}


def _answer(record: Record, layout: Mapping[str, str], place: str) -> Answer:
    found = {
        name: record[key] if key in record else _look_up(record, key)
        for name, key in layout.items()
    }
    for name in ("id", "answer"):
        if found.get(name) is None:
            raise ValueError(
                f"{place} has no {layout.get(name, name)!r}; it has {sorted(record)}. Name the key "
                f"that holds the {name}: --keys {name}=KEY."
            )
    row_id, answer = str(found.pop("id")), str(found.pop("answer"))
    record_of_data = found.get("groups")
    if layout.get("groups") == _LMMS_EVAL["groups"] and isinstance(record_of_data, Mapping):
        found["groups"] = {
            name: record_of_data[name] for name in GROUP_KEYS if name in record_of_data
        }
    return Answer(
        id=row_id,
        answer=answer,
        fields={name: value for name, value in found.items() if value is not None},
    )


def _look_up(record: object, key: str) -> object:
    """A value by a key with dots; None if it is not there."""
    if isinstance(record, Mapping) and key in record:
        return record[key]
    head, dot, rest = key.partition(".")
    if isinstance(record, list) and head.isdigit() and int(head) < len(record):
        return _look_up(record[int(head)], rest) if dot else record[int(head)]
    if dot and isinstance(record, Mapping) and head in record:
        return _look_up(record[head], rest)
    return None


def _prediction(row_id: str, answer: str, truth: str, said: Mapping[str, object]) -> Prediction:
    options = _texts(said.get("options"))
    given = said.get("answer_type")
    answer_type, decided_by = decide_answer_type(
        None if given is None else str(given), truth, options
    )
    stated = said.get("answer_type_from")
    return Prediction(
        id=row_id,
        images=_texts(said.get("images")),
        question=str(said.get("question", "")),
        prompt=str(said.get("prompt", "none")),
        answer=answer,
        truth=truth,
        answer_type=answer_type,
        answer_type_from=decided_by if stated is None else str(stated),
        options=options,
        groups=_groups(said.get("groups")),
        num_tokens=_int(said.get("num_tokens")),
        seconds=_float(said.get("seconds")),
        is_cut=None if said.get("is_cut") is None else bool(said["is_cut"]),
        num_images_seen=_int(said.get("num_images_seen")),
        probabilities=_shares(said.get("probabilities")),
    )


def _texts(value: object) -> tuple[str, ...]:
    if isinstance(value, str):
        return (value,) if value else ()
    return tuple(map(str, value)) if isinstance(value, list | tuple) else ()


def _groups(value: object) -> dict[str, str]:
    if not isinstance(value, dict):  # a check for any Mapping takes as long as the rest
        return {}
    return {str(name): str(item) for name, item in value.items() if item is not None}


def _float(value: object) -> float | None:
    return None if value is None or not isinstance(value, int | float) else float(value)


def _int(value: object) -> int | None:
    return None if value is None or not isinstance(value, int | float) else int(value)


def _shares(value: object) -> dict[str, float] | None:
    if not isinstance(value, Mapping):
        return None
    return {str(name): float(share) for name, share in value.items()}
