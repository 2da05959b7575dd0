"""Chat rows → one padded training batch whose labels are the assistant's turns."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from moellava.model.processing_moellava import MoeLlavaProcessor

IGNORE_INDEX = -100  # what the loss leaves out


class ChatCollator:
    """Collates rows `{"messages": [...]}` for training.

    Messages are those of chat templates: `role` and `content`, where the content is a string or a list of
    `{"type": "text", "text": ...}` and `{"type": "image", "image": <PIL image or path>}`. Labels come from
    the token spans that the template itself marks as the assistant's, never from comparing strings.
    """

    def __init__(self, processor: MoeLlavaProcessor):
        self.processor = processor

    def __call__(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, Tensor]:
        """Collate.

        Returns:
            `input_ids`, `attention_mask`, `labels` (B, T), padded on the right, labels -100 outside the
            assistant's turns; `pixel_values` (I, 3, H, W) where there are images.

        Raises:
            ValueError: if a row has no supervised token; its `id`, or its place in the batch, is named.
        """
        batch: Any = self.processor.apply_chat_template(
            [row["messages"] for row in rows],
            tokenize=True,
            return_dict=True,
            return_assistant_tokens_mask=True,
            return_tensors="pt",
            processor_kwargs={"padding": True, "padding_side": "right"},
        )
        is_answer = torch.as_tensor(batch.pop("assistant_masks")).bool()
        for index, row in enumerate(rows):
            if not is_answer[index].any():
                raise ValueError(
                    f"Row {row.get('id', index)!r} has no assistant turn to learn from. "
                    "Give it an answer, or leave it out."
                )
        return {**batch, "labels": batch["input_ids"].masked_fill(~is_answer, IGNORE_INDEX)}
