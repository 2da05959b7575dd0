"""Chat rows → one training batch whose labels are the assistant's turns."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, Protocol, cast

import torch
from PIL import Image
from torch import Tensor
from transformers import DataCollatorWithFlattening

from moellava.data.chat_labels import ChatTokens, image_items, tokenize_chat
from moellava.images import PART_OPTIONS, ImageLike, to_pil
from moellava.messages import unknown_name
from moellava.model.chat_templates import TEMPLATES
from moellava.model.processing_moellava import MoeLlavaProcessor
from moellava.model.tiling import Layout
from moellava.model.turns import expand_images

IGNORE_INDEX = -100  # what the loss leaves out
LONG_ROWS = ("error", "truncate")


class KeptViews(NamedTuple):
    """What a frozen tower made of an image.

    Args:
        tokens: (V, N, D), the patch tokens of each view.
        size: width and height of the image, in pixels; used with tiling alone.
    """

    tokens: Tensor
    size: tuple[int, int]


class ChatRow(Protocol):
    """A row that knows its messages, as `moellava.data.Row` does."""

    @property
    def id(self) -> str: ...
    def messages(self) -> Sequence[Mapping[str, Any]]: ...


Rowlike = Mapping[str, Any] | ChatRow


class ChatCollator:
    """Collates rows for training.

    A row is a mapping with `messages`, or has a method `messages()` and an `id`, as
    `moellava.data.Row` does.
    Messages are those of chat templates: `role` and `content`, where the content is a string or a
    list of `{"type": "text", "text": ...}` and `{"type": "image", "image": <PIL image, path, array
    or bytes>}`, which may have the options of `moellava.images.PartOptions`. Labels come from the
    token spans that the template itself marks as the assistant's, never from comparing strings.

    Args:
        processor: of the model.
        chat_template: a name of `moellava.model.chat_templates.TEMPLATES`, such as `plain`, or a
            template's text; None is the processor's own.
        max_length: most tokens of a row, image placeholders included; None is no limit.
        long_rows: what becomes of longer rows. `error` names the row; `truncate` cuts its end, and
            is an error only where that would cut an image's placeholders or leave nothing to learn.
        packing: lay the rows of a batch one behind the other, without padding. Positions begin anew
            at each, from which transformers' attention knows that no row may look at another.
        patch_tokens: gives the patch tokens of an image's views, in place of opening it and
            encoding its pixels.
        load_image: opens what an image item holds.
        return_row_ids: also give `row_ids`, a list that no model takes.
    """

    def __init__(
        self,
        processor: MoeLlavaProcessor,
        *,
        chat_template: str | None = None,
        max_length: int | None = None,
        long_rows: str = "error",
        packing: bool = False,
        patch_tokens: Callable[[ImageLike], KeptViews] | None = None,
        load_image: Callable[[ImageLike], Image.Image] = to_pil,
        return_row_ids: bool = False,
    ) -> None:
        if long_rows not in LONG_ROWS:
            raise unknown_name("long_rows", long_rows, LONG_ROWS)
        self.processor = processor
        self.chat_template = resolve_chat_template(processor, chat_template)
        self.max_length = max_length
        self.long_rows = long_rows
        self.packing = packing
        self.patch_tokens = patch_tokens
        self.load_image = load_image
        self.return_row_ids = return_row_ids

    def __call__(self, rows: Sequence[Rowlike]) -> dict[str, Any]:
        """Collate.

        Returns:
            `input_ids` and `labels` (B, T), labels -100 outside the assistant's turns;
            `attention_mask` (B, T), with padding on the right, or with packing `position_ids` (1,
            T) and `use_cache=False` instead; where there are images, `pixel_values` (V, 3, H, W) of
            all their views, or `patch_tokens` (V, N, D), and `image_sizes` (I, 2) for a model that
            merges views.

        Raises:
            ValueError: if a row has no supervised token, is too long, or has an image that cannot
                be opened; its `id`, or its place in the batch, is named.
        """
        features: list[dict[str, list[int]]] = []
        images: list[Image.Image | KeptViews] = []
        ids: list[object] = []
        for index, row in enumerate(rows):
            messages, row_id = messages_of(row), id_of(row, index)
            try:
                opened = [self._open(item["image"]) for item in image_items(messages)]
                tokens = tokenize_chat(
                    messages, self.processor, self.chat_template, self._layouts(opened)
                )
            except (OSError, ValueError) as error:
                raise ValueError(f"Row {row_id!r}: {error}") from error
            images += opened
            features.append(self._label(tokens, row_id))
            ids.append(row_id)
        batch: dict[str, Any] = self._pack(features) if self.packing else self._pad(features)
        if images and self.patch_tokens is not None:
            kept = cast(list[KeptViews], images)
            batch["patch_tokens"] = torch.cat([views.tokens for views in kept])
            batch |= self.processor.merge_inputs([views.size for views in kept])
        elif images:
            batch |= self.processor.image_inputs(images)
        return {**batch, "row_ids": ids} if self.return_row_ids else batch

    def _open(self, image: ImageLike) -> Image.Image | KeptViews:
        return self.load_image(image) if self.patch_tokens is None else self.patch_tokens(image)

    def _layouts(self, opened: Sequence[Image.Image | KeptViews]) -> list[Layout] | None:
        if self.processor.tiling is None:
            return None
        return [self.processor.layout(image.size) for image in opened]

    def _label(self, tokens: ChatTokens, row_id: object) -> dict[str, list[int]]:
        input_ids, is_answer = tokens
        if not any(is_answer):
            raise ValueError(
                f"Row {row_id!r} has no assistant turn to learn from. "
                "Give it an answer, or leave it out."
            )
        if self.max_length is not None and len(input_ids) > self.max_length:
            length = (
                f"Row {row_id!r} has {len(input_ids)} tokens, but max_length is {self.max_length}"
            )
            if self.long_rows == "error":
                raise ValueError(
                    f"{length}. Shorten it, raise max_length, or set long_rows=truncate."
                )
            cuts_image = self.processor.image_token_id in input_ids[self.max_length :]
            if cuts_image or not any(is_answer[: self.max_length]):
                lost = "an image" if cuts_image else "the whole answer"
                raise ValueError(
                    f"{length}, which would cut off {lost}. Shorten it, or raise max_length."
                )
            input_ids, is_answer = input_ids[: self.max_length], is_answer[: self.max_length]
        labels = [
            token if answered else IGNORE_INDEX
            for token, answered in zip(input_ids, is_answer, strict=True)
        ]
        return {"input_ids": input_ids, "labels": labels}

    def _pad(self, features: list[dict[str, list[int]]]) -> dict[str, Tensor]:
        padding = {"input_ids": self.processor.tokenizer.pad_token_id, "labels": IGNORE_INDEX}
        length = max(len(feature["input_ids"]) for feature in features)
        batch = {
            key: torch.tensor(
                [feature[key] + [value] * (length - len(feature[key])) for feature in features]
            )
            for key, value in padding.items()
        }
        # By length, never by id: TinyLlama pads with </s>, which also ends each answer.
        lengths = torch.tensor([len(feature["input_ids"]) for feature in features])
        return {**batch, "attention_mask": (torch.arange(length) < lengths[:, None]).long()}

    def _pack(self, features: list[dict[str, list[int]]]) -> dict[str, Any]:
        flatten = DataCollatorWithFlattening()
        packed: dict[str, Any] = flatten(features, return_tensors="pt")
        # With a cache, transformers would not look for the rows' beginnings.
        return {**packed, "use_cache": False}


def resolve_chat_template(processor: MoeLlavaProcessor, chat_template: str | None) -> str:
    """The text of a template: the processor's own for None, one of ours by name, or the text.

    Raises:
        ValueError: for a name that no template has.
    """
    if chat_template is None:
        own: Any = processor.chat_template
        return own["default"] if isinstance(own, Mapping) else str(own)
    if chat_template in TEMPLATES:
        return TEMPLATES[chat_template]
    if "{" not in chat_template:
        raise unknown_name("chat template", chat_template, TEMPLATES)
    return chat_template


def messages_of(row: Rowlike) -> Sequence[Mapping[str, Any]]:
    """The chat messages of a row, in either form that `ChatCollator` takes."""
    messages: Sequence[Mapping[str, Any]]
    messages = row["messages"] if isinstance(row, Mapping) else row.messages()
    if any(name in item for item in image_items(messages) for name in PART_OPTIONS):
        return expand_images(messages)
    return messages


def id_of(row: Rowlike, index: int) -> object:
    """A row's id; its place if it has none."""
    return row.get("id", index) if isinstance(row, Mapping) else row.id
