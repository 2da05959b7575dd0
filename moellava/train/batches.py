"""The rows that a recipe names, how they become batches, and how long they are.

| name | what it gives |
|---|---|
| `read_data` | the rows of a recipe, as `TrainData` |
| `build_collator` | what makes batches of them |
| `row_lengths` | tokens of each row |
"""

import logging
from collections.abc import Sequence
from dataclasses import dataclass

from moellava.data import read_rows
from moellava.data.chat_labels import num_chat_tokens
from moellava.data.collate import ChatCollator, messages_of
from moellava.data.rows import Row
from moellava.images import load_image
from moellava.messages import first_names
from moellava.model.processing_moellava import MoeLlavaProcessor
from moellava.train.options import Recipe
from moellava.train.usable_rows import usable_rows

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class TrainData:
    """The rows to learn from, and the held-out ones."""

    train: Sequence[Row]
    evaluation: Sequence[Row] | None


def read_data(recipe: Recipe, *, show_progress: bool = False) -> TrainData:
    """The rows that the recipe names, each looked at: it has an answer, and images that open.

    Raises:
        OSError: if they cannot be found.
        ValueError: for a row that cannot be used (unless `data.skip_bad`), or if there is none.
    """
    options = recipe.data
    if options.train is None:
        raise ValueError(
            "The recipe names no training data. Add data.train=FILE (and data.images=FOLDER)."
        )
    rows = _read("data.train", options.train, options.train_split, recipe, show_progress)
    if options.evaluation is None:
        return TrainData(rows, None)
    held_out = _read(
        "data.evaluation", options.evaluation, options.evaluation_split, recipe, show_progress
    )
    if recipe.evaluation.num_rows is not None:
        count = min(recipe.evaluation.num_rows, len(held_out))
        held_out = [held_out[index] for index in range(count)]
    return TrainData(rows, held_out)


def _read(
    key: str, source: str, split: str | None, recipe: Recipe, show_progress: bool
) -> Sequence[Row]:
    options = recipe.data
    rows = read_rows(
        source,
        split=split,
        images=options.images,
        format=options.format,
        skip_bad=options.skip_bad,
    )
    if len(rows) == 0:
        raise ValueError(f"{key} is {source!r}, which has no rows.")
    return usable_rows(rows, key, skip_bad=options.skip_bad, show_progress=show_progress)


def build_collator(
    recipe: Recipe, processor: MoeLlavaProcessor, *, return_row_ids: bool = True
) -> ChatCollator:
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


def row_lengths(rows: Sequence[Row], collator: ChatCollator) -> list[int]:
    """Tokens of each row, without opening an image, unless the model has tiling.

    Raises:
        ValueError: naming the rows that are too long, before a step is trained.
    """
    lengths = num_chat_tokens(
        [messages_of(row) for row in rows],
        collator.processor,
        collator.chat_template,
        collator.load_image,
    )
    limit = collator.max_length
    if limit is None:
        return lengths
    too_long = [index for index, length in enumerate(lengths) if length > limit]
    if too_long and collator.long_rows == "error":
        named = first_names([f"{rows[index].id!r} ({lengths[index]})" for index in too_long])
        raise ValueError(
            f"{len(too_long)} of {len(lengths)} rows have more than data.max_length={limit} "
            f"tokens: {named}. Raise data.max_length, shorten them, or set data.long_rows=truncate."
        )
    if too_long:
        logger.warning("%d of %d rows are cut to %d tokens", len(too_long), len(lengths), limit)
    return [min(length, limit) for length in lengths]
