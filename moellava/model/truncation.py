"""Rows of token ids that are too long → shorter ones that keep every image token.

| name | what it does |
|---|---|
| `shorten_text` | drops text tokens |
| `pad_rows` | makes rows one length |
"""

from collections.abc import MutableMapping, Sequence
from typing import Any

# What stands at a padded position, by the names of a tokenizer's and processor's per-token lists.
PADDING = {
    "attention_mask": 0,
    "mm_token_type_ids": 0,
    "token_type_ids": 0,
    "special_tokens_mask": 1,
}
PADDING_OFFSETS = (0, 0)
PER_TOKEN = ("input_ids", *PADDING, "offset_mapping")


def shorten_text(
    rows: MutableMapping[str, Any],
    max_length: int,
    *,
    image_token_id: int,
    bos_token_id: int | None,
    side: str,
    kept_between: Sequence[int] = (),
) -> None:
    """Drop text tokens, in place, from each row longer than `max_length`; image tokens stay.

    Args:
        rows: `input_ids` and the other lists of `PER_TOKEN`, a list per row, not padded.
        side: "right" drops the last text tokens first, "left" the first ones after <s>.
        kept_between: token ids that stay where they stand between two image tokens.

    Raises:
        ValueError: if the image tokens alone are more than `max_length`; both numbers are given.
    """
    for index, ids in enumerate(rows["input_ids"]):
        excess = len(ids) - max_length
        if excess <= 0:
            continue
        has_bos = bool(ids) and ids[0] == bos_token_id
        kept = _places_between(ids, kept_between, image_token_id)
        text = [
            place
            for place, token in enumerate(ids)
            if token != image_token_id and place not in kept
        ][has_bos:]
        num_image = len(ids) - len(text) - has_bos
        if excess > len(text):
            raise ValueError(
                f"Prompt {index + 1} has {num_image} image tokens, which are never cut, but "
                f"max_length is {max_length}. Pass fewer images in one prompt, raise max_length, "
                "or build the model with a projector that gives fewer tokens per image, such as "
                "pixel_shuffle."
            )
        dropped = set(text[-excess:] if side == "right" else text[:excess])
        for name in PER_TOKEN:
            if name in rows:
                rows[name][index] = [
                    value for place, value in enumerate(rows[name][index]) if place not in dropped
                ]


def _places_between(ids: Sequence[int], wanted: Sequence[int], image_token_id: int) -> set[int]:
    """The places of the tokens `wanted` where they stand between two image tokens."""
    size = len(wanted)
    return {
        place
        for start in range(1, len(ids) - size)
        if list(ids[start : start + size]) == list(wanted)
        and ids[start - 1] == ids[start + size] == image_token_id
        for place in range(start, start + size)
    }


def pad_rows(rows: MutableMapping[str, Any], length: int, *, pad_token_id: int, side: str) -> None:
    """Make every list of `PER_TOKEN` in `rows` at least `length` long, in place."""
    for name in PER_TOKEN:
        if name in rows:
            value: Any = {"input_ids": pad_token_id, "offset_mapping": PADDING_OFFSETS}.get(
                name, PADDING.get(name)
            )
            rows[name] = [_pad(row, [value] * (length - len(row)), side) for row in rows[name]]


def _pad(row: Sequence[Any], padding: list[Any], side: str) -> list[Any]:
    return [*padding, *row] if side == "left" else [*row, *padding]
