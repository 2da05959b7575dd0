"""The rows that a recipe names, how they become batches, and how long they are.

Public names: `TrainData`, `read_data`, `build_collator`, `row_lengths`.
"""

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from moellava.data import read_rows
from moellava.data.chat_labels import num_chat_tokens
from moellava.data.collate import ChatCollator, messages_of
from moellava.data.images import load_image
from moellava.train.recipe import Recipe

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class TrainData:
    """The rows to learn from, and the held-out ones."""

    train: Sequence[Any]
    evaluation: Sequence[Any] | None


def read_data(recipe: Recipe) -> TrainData:
    """The rows that the recipe names.

    Raises:
        OSError: if they cannot be found.
        ValueError: for a malformed row (unless `data.skip_bad`), or if there is none.
    """
    options = recipe.data
    if options.train is None:
        raise ValueError(
            "The recipe names no training data. Add data.train=FILE (and data.images=FOLDER)."
        )
    common: dict[str, Any] = {
        "images": options.images,
        "format": options.format,
        "skip_bad": options.skip_bad,
    }
    rows = read_rows(options.train, split=options.train_split, **common)
    evaluation: Any = None
    if options.evaluation is not None:
        evaluation = read_rows(options.evaluation, split=options.evaluation_split, **common)
        if recipe.evaluation.num_rows is not None:
            evaluation = [
                evaluation[index]
                for index in range(min(recipe.evaluation.num_rows, len(evaluation)))
            ]
    for name, found in (("data.train", rows), ("data.evaluation", evaluation)):
        if found is not None and len(found) == 0:
            raise ValueError(
                f"{name} is {getattr(options, name.partition('.')[2])!r}, which has no rows."
            )
    return TrainData(rows, evaluation)


def build_collator(recipe: Recipe, processor: Any, *, return_row_ids: bool = True) -> ChatCollator:
    """The collator that the recipe's `data` describes."""
    options = recipe.data
    return ChatCollator(
        processor,
        chat_template=options.chat_template,
        max_length=options.max_length,
        long_rows=options.long_rows,
        packing=options.packing,
        load_image=load_image,
        return_row_ids=return_row_ids,
    )


def row_lengths(rows: Sequence[Any], collator: ChatCollator) -> list[int]:
    """Tokens of each row, without opening an image.

    Raises:
        ValueError: naming the rows that are too long, before a step is trained.
    """
    lengths = num_chat_tokens(
        [messages_of(row) for row in rows], collator.processor, collator.chat_template
    )
    limit = collator.max_length
    if limit is None:
        return lengths
    too_long = [index for index, length in enumerate(lengths) if length > limit]
    if too_long and collator.long_rows == "error":
        named = ", ".join(f"{rows[index].id!r} ({lengths[index]})" for index in too_long[:5])
        raise ValueError(
            f"{len(too_long)} of {len(lengths)} rows have more than data.max_length={limit} tokens: {named}"
            f"{', ...' if len(too_long) > 5 else ''}. Raise data.max_length, shorten them, or set "
            "data.long_rows=truncate."
        )
    if too_long:
        logger.warning("%d of %d rows are cut to %d tokens", len(too_long), len(lengths), limit)
    return [min(length, limit) for length in lengths]
