"""One conversation → its token ids, and which of them are the assistant's: `tokenize_chat`."""

import re
from bisect import bisect_left
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, cast

import jinja2
from PIL import Image
from transformers.utils.chat_template_utils import render_jinja_template

from moellava.images import to_pil
from moellava.model.chat_templates import has_beginning
from moellava.model.processing_moellava import MoeLlavaProcessor
from moellava.model.tiling import Layout

Messages = Sequence[Mapping[str, Any]]
# Texts, and for each the (start, end) of the assistant's turns, in characters.
Rendered = tuple[list[str], list[list[tuple[int, int]]]]

_MARKS = re.compile(r"\{%-?\s*generation\s*-?%\}")


class ChatTokens(NamedTuple):
    """Both lists have one entry per token, each image standing as all of its placeholders."""

    input_ids: list[int]
    is_answer: list[bool]


def tokenize_chat(
    messages: Messages,
    processor: MoeLlavaProcessor,
    chat_template: str,
    layouts: Sequence[Layout] | None = None,
) -> ChatTokens:
    """Token ids as the model is asked with, and which of them it has to learn: the assistant's.

    Where the template has `{% generation %}` marks, those say what the assistant's is. Any other
    template is rendered
    turn by turn: what a turn adds to the prompt that asks for it is the answer, with its
    end-of-turn token and without the white space behind that.

    Args:
        layouts: `processor.layout` of each image; None is one view of each.

    Raises:
        ValueError: if the template cannot be read turn by turn, or the text holds another number of
            `<image>` than the messages hold images.
    """
    tokenizer = processor.tokenizer
    text, spans = _render(messages, processor, chat_template)
    has_bos = has_beginning(tokenizer, text)
    encoded = tokenizer(text, return_offsets_mapping=True, add_special_tokens=not has_bos)
    input_ids: list[int] = []
    is_answer: list[bool] = []
    starts = [start for start, _ in spans]
    num_images = len(image_items(messages))
    if layouts is None:
        layouts = [processor.layout((1, 1))] * num_images
    places = [processor.layout_ids(layout) for layout in layouts]
    num_found = 0
    for token, (start, end) in zip(encoded["input_ids"], encoded["offset_mapping"], strict=True):
        span = bisect_left(starts, end) - 1  # the last span that begins before the token's end
        answered = start < end and span >= 0 and start < spans[span][1]
        if token != processor.image_token_id:
            input_ids.append(token)
            is_answer.append(answered)
            continue
        place_ids = places[num_found] if num_found < num_images else []  # too many: said below
        num_found += 1
        input_ids += place_ids
        is_answer += [False] * len(place_ids)
    if num_found != num_images:
        raise ValueError(
            f"the text holds {num_found} {processor.image_token}, but the messages hold "
            f"{num_images} images. Put one image item for each, and do not write the placeholder "
            "in the text."
        )
    return ChatTokens(input_ids, is_answer)


def num_chat_tokens(
    conversations: Sequence[Messages],
    processor: MoeLlavaProcessor,
    chat_template: str,
    load_image: Callable[[Any], Image.Image] = to_pil,
) -> list[int]:
    """How many tokens `tokenize_chat` gives for each conversation.

    Args:
        load_image: opens what an image item holds; only with tiling, which asks for its size.
    """
    tokenizer = processor.tokenizer
    lengths: list[int] = []
    # One call for many, so that the tokenizer can use its threads.
    for start in range(0, len(conversations), 1000):
        texts, _ = _render_jinja(conversations[start : start + 1000], processor, chat_template)
        has_bos = has_beginning(tokenizer, texts[0])
        encoded = tokenizer(texts, add_special_tokens=not has_bos)["input_ids"]
        for messages, ids in zip(conversations[start : start + 1000], encoded, strict=True):
            num_marks = ids.count(processor.image_token_id)
            num_placed = num_marks * processor.num_image_tokens
            if processor.tiling is not None:
                images = [load_image(item["image"]) for item in image_items(messages)]
                num_placed = sum(
                    len(processor.layout_ids(processor.layout(image.size))) for image in images
                )
            lengths.append(len(ids) - num_marks + num_placed)
    return lengths


def image_items(messages: Messages) -> list[Mapping[str, Any]]:
    """The image items of a conversation, in order."""
    return [
        item
        for message in messages
        if not isinstance(message["content"], str)
        for item in message["content"]
        if item["type"] == "image"
    ]


def without_pictures(messages: Messages) -> list[dict[str, Any]]:
    """The messages for a template, without the pictures that Jinja would copy for nothing."""
    return [
        dict(message)
        if isinstance(message["content"], str)
        else {
            **message,
            "content": [
                {"type": "image"} if item["type"] == "image" else dict(item)
                for item in message["content"]
            ],
        }
        for message in messages
    ]


def _render(
    messages: Messages, processor: MoeLlavaProcessor, chat_template: str
) -> tuple[str, list[tuple[int, int]]]:
    """The text, and the assistant's (start, end) in it, in characters."""
    if _MARKS.search(chat_template):
        texts, spans = _render_jinja([messages], processor, chat_template, with_spans=True)
        return texts[0], [(start, end) for start, end in spans[0]]
    text = _render_jinja([messages], processor, chat_template)[0][0]
    found: list[tuple[int, int]] = []
    for index, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        asked = _render_jinja([messages[:index]], processor, chat_template, asks=True)[0][0]
        answered = _render_jinja([messages[: index + 1]], processor, chat_template)[0][0].rstrip()
        if not (text.startswith(answered) and answered.startswith(asked)):
            raise ValueError(
                "the chat template has no {% generation %} marks and writes earlier turns in "
                "another way once later ones follow, so that the assistant's tokens cannot be "
                "told. Add the marks to processor.chat_template."
            )
        found.append((len(asked), len(answered)))
    return text, found


def _render_jinja(
    conversations: Sequence[Messages],
    processor: MoeLlavaProcessor,
    chat_template: str,
    *,
    asks: bool = False,
    with_spans: bool = False,
) -> Rendered:
    special_tokens = processor.tokenizer.special_tokens_map
    slim = [without_pictures(messages) for messages in conversations]
    # transformers declares the result a string; it is two lists.
    try:
        return cast(
            Rendered,
            render_jinja_template(
                slim,
                chat_template=chat_template,
                return_assistant_tokens_mask=with_spans,
                add_generation_prompt=asks,
                **special_tokens,
            ),
        )
    except jinja2.TemplateError as error:
        raise ValueError(f"the chat template refuses the messages: {error}") from error
