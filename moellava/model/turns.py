"""Messages with text and images → turns, whose images are prepared for the model.

| name | gives |
|---|---|
| `read_message` | a `Turn` of a message, its images as `Picture`s |
| `read_picture` | one image, prepared for the model once |
| `read_pictures` | all that an image stands for |
| `with_images` | the messages of a question and its images in their order |

An image that stands for several pictures (a volume, a cine, a slide) becomes several, in order,
each behind the words that say where it lies.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeAlias, cast

from PIL import Image
from torch import Tensor
from typing_extensions import Unpack

from moellava.images import (
    PART_OPTIONS,
    ImageLike,
    ImagePart,
    PartOptions,
    image_parts,
    to_eight_bit,
    to_pil,
    with_words,
)
from moellava.messages import unknown_name
from moellava.model.processing_moellava import MoeLlavaProcessor
from moellava.model.tiling import Layout

ROLES = ("system", "user", "assistant")
# {"role": "user", "content": "..."}, or a list of items:
# {"type": "text", "text": "..."} and {"type": "image", "image": any image, "window": "lung"}.
Message: TypeAlias = Mapping[str, object]


@dataclass(eq=False)
class Picture:
    """An image as the model takes it; the embeddings are filled in when it is first asked about."""

    inputs: dict[str, Tensor]  # `MoeLlavaProcessor.image_inputs`
    layout: Layout
    name: str | None = None
    view: dict[str, object] = field(default_factory=dict)
    embeds: list[Tensor] | None = None  # (N, D_t) of each mark of the layout


@dataclass(frozen=True)
class Turn:
    """One message: texts and pictures in the order in which they were given."""

    role: str
    content: tuple[str | Picture, ...]

    @property
    def pictures(self) -> list[Picture]:
        return [item for item in self.content if isinstance(item, Picture)]

    @property
    def text(self) -> str:
        return "".join(item for item in self.content if isinstance(item, str))


def read_message(processor: MoeLlavaProcessor, message: Message) -> Turn:
    """A checked turn; images are read and preprocessed.

    Raises:
        ValueError: an unknown role, key or kind of item, an empty message, an unreadable image.
    """
    role, content = message.get("role"), message.get("content")
    if not isinstance(role, str) or role not in ROLES:
        raise unknown_name("role", _shortened(role).strip("'"), ROLES)
    if extra := [name for name in message if name not in ("role", "content")]:
        raise unknown_name("key of a message", extra[0], ("role", "content"))
    items = [text_item(content)] if isinstance(content, str) else content
    if not isinstance(items, Sequence):
        raise ValueError(
            f"The content of a message is {_shortened(content)}; expected text or a list."
        )
    parts = [part for item in items for part in _read_item(processor, item)]
    turn = Turn(role, tuple(parts))
    if role != "user" and turn.pictures:
        raise ValueError(f"A message of the role {role!r} holds an image; only the user's may.")
    if role == "user" and not turn.text.strip() and not turn.pictures:
        raise ValueError("The question is empty. Write one, or add an image.")
    return turn


def read_picture(processor: MoeLlavaProcessor, image: ImageLike) -> Picture:
    """An image of any kind, as the model takes it."""
    pil = to_eight_bit(to_pil(image))
    view = image.options if isinstance(image, ImagePart) else {}
    source = image.source if isinstance(image, ImagePart) else image
    name = Path(source).name if isinstance(source, str | Path) else None
    return Picture(processor.image_inputs([pil]), processor.layout(pil.size), name, view)


def read_pictures(
    processor: MoeLlavaProcessor, image: ImageLike, **options: Unpack[PartOptions]
) -> list[str | Picture]:
    """The pictures that an image stands for, each behind its words if it has any.

    Args:
        **options: see `moellava.images.PartOptions`.
    """
    items = with_words(image_parts(image, **options))
    return [item if isinstance(item, str) else read_picture(processor, item) for item in items]


def is_conversation(question: object) -> bool:
    """Whether something is chat messages: a list of mappings with a role."""
    if not isinstance(question, Sequence) or isinstance(question, str | bytes):
        return False
    return bool(question) and all(isinstance(turn, Mapping) for turn in question)


def with_images(
    question: Any, images: Sequence[object], options: PartOptions
) -> tuple[list[dict[str, Any]], list[Image.Image]]:
    """The chat messages of a question, and its images in their order, as they are seen.

    A string is one turn with the images before it. Messages may hold images of their own; images
    beside them fill the empty image items, or stand before the first turn of the user. An image
    item may have a `window`, `slices`, ... of its own, in place of that of `options`.
    """
    if isinstance(question, str):
        question = [{"role": "user", "content": [*map(image_item, images), text_item(question)]}]
        images = ()
    if not is_conversation(question):
        raise not_a_question(question)
    messages = [_with_item_list(turn) for turn in question]
    places = [item for turn in messages for item in turn["content"] if item.get("type") == "image"]
    empty = [item for item in places if "image" not in item]
    if images and not places:
        first = next((turn for turn in messages if turn["role"] == "user"), messages[0])
        first["content"] = [*map(image_item, images), *first["content"]]
    elif len(empty) != len(images):
        raise ValueError(
            f"The messages have {len(empty)} image items without an image, but {len(images)} "
            "images are given. Give one image for each."
        )
    else:
        for item, image in zip(empty, images, strict=True):
            item["image"] = image
    messages = expand_images(messages, **options)
    items = [item for turn in messages for item in turn["content"] if item["type"] == "image"]
    return messages, [to_pil(item.pop("image")) for item in items]


def expand_images(
    messages: Sequence[Mapping[str, Any]], **options: Unpack[PartOptions]
) -> list[dict[str, Any]]:
    """The messages with each image item as its `ImagePart`s behind their words; none is opened.

    Args:
        **options: where an item has none of its own.
    """
    return [
        {**message, "content": [part for item in content for part in _shown(item, options)]}
        if not isinstance(content := message["content"], str)
        else dict(message)
        for message in messages
    ]


def _shown(item: Mapping[str, Any], options: PartOptions) -> list[dict[str, Any]]:
    if item.get("type") != "image":
        return [dict(item)]
    rest = dict(item)
    own: Any = {name: rest.pop(name) for name in PART_OPTIONS if name in item}
    parts = with_words(image_parts(rest.pop("image"), **{**options, **own}))
    return [text_item(part) if isinstance(part, str) else {**rest, "image": part} for part in parts]


def not_a_question(given: object) -> TypeError:
    """The error for what is neither text nor a conversation."""
    return TypeError(
        f"A question is a {type(given).__name__}; expected a string, or a list of chat messages "
        "such as {'role': 'user', 'content': 'What is this?'}."
    )


def _with_item_list(turn: Any) -> dict[str, Any]:
    """A message whose content is a list of items, copied."""
    if "role" not in turn or "content" not in turn:
        raise TypeError(
            f"A chat message has the keys {', '.join(map(str, turn))}; expected 'role' and "
            "'content'."
        )
    content = turn["content"]
    if isinstance(content, str):
        return {**turn, "content": [{"type": "text", "text": content}]}
    return {**turn, "content": [dict(item) for item in content]}


def _read_item(processor: MoeLlavaProcessor, item: object) -> list[str | Picture]:
    if not isinstance(item, Mapping) or item.get("type") not in ("text", "image"):
        raise ValueError(
            f"An item of a message is {_shortened(item)}; expected "
            '{"type": "text", "text": ...} or {"type": "image", "image": ...}.'
        )
    rest = {name: value for name, value in item.items() if name != "type"}
    known = ("text",) if item["type"] == "text" else ("image", *PART_OPTIONS)
    if extra := [name for name in rest if name not in known]:
        raise unknown_name(f"key of an item of type {item['type']!r}", str(extra[0]), known)
    if item["type"] == "text":
        if not isinstance(rest.get("text"), str):
            raise ValueError(f"The text of an item is {_shortened(rest.get('text'))}.")
        return [cast(str, rest["text"])]
    if rest.get("image") is None:
        raise ValueError('An item of type "image" has no "image".')
    return read_pictures(processor, cast(Any, rest.pop("image")), **rest)


def _shortened(value: object, most: int = 80) -> str:
    """A value as the error names it; of objects such as a pydicom dataset only the type.

    Their text may hold what a file says of a patient.
    """
    if not isinstance(value, str | int | float | None):
        keys = f" with the keys {sorted(map(str, value))}" if isinstance(value, dict) else ""
        return f"a {type(value).__name__}{keys}"
    text = repr(value)
    return text if len(text) <= most else f"{text[:most]}..."


def text_item(text: str) -> dict[str, object]:
    """A text as an item of a message."""
    return {"type": "text", "text": text}


def image_item(image: object) -> dict[str, object]:
    """An image, or `{"image": ..., "window": ..., ...}`, as an item of a message."""
    if isinstance(image, Mapping) and "image" in image:
        return {"type": "image", **image}
    return {"type": "image", "image": image}


def as_list(images: object) -> list[object]:
    """None, one image or several as a list."""
    if images is None:
        return []
    return list(images) if isinstance(images, list | tuple) else [images]
