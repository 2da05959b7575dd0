"""A model → which place of the image each of its image tokens stands for, if they have places.

| name | what it gives |
|---|---|
| `TokenGrid` | rows and columns of the image tokens, and tokens before them |
| `find_token_grid` | the grid of a model, or a `ValueError` with the reason if it has none |
"""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from moellava.model.modeling_moellava import MoeLlavaForConditionalGeneration

Array = npt.NDArray[np.float32]


@dataclass(frozen=True)
class TokenGrid:
    """Image tokens row by row, after `num_before` tokens without a place (the class token)."""

    rows: int
    columns: int
    num_before: int = 0

    def maps(self, values: Array) -> Array:
        """(..., tokens of one image) → (..., rows, columns)."""
        placed = values[..., self.num_before :]
        return placed.reshape(*values.shape[:-1], self.rows, self.columns)


def find_token_grid(model: MoeLlavaForConditionalGeneration) -> TokenGrid:
    """Where the image tokens of a model stand, found by changing single patch tokens.

    Asking the projector itself covers those of plug-ins, too: a grid is kept if a patch changes the
    token of its own place most, and leaves others untouched.

    Raises:
        ValueError: if the tokens have no places, with the reason.
    """
    config = model.config
    if model.model.vision_tower.synthesized:
        raise ValueError(
            "The patch tokens are synthesized: one pooled vector, repeated. They have no places, "
            "so attention to them cannot be drawn. Use a tower with real patch tokens, or draw "
            "the 'ablation' or 'gradient' map, which work on pixels."
        )
    merge = (config.tiling or {}).get("merge", "flat")
    if merge != "flat":
        raise ValueError(
            f"The model merges the tiles of an image (merge={merge!r}), so its "
            "image tokens are not those of single tiles, and attention to them cannot be drawn. "
            "Draw the 'ablation' or 'gradient' map, which work on pixels."
        )
    shape = config.projector_shape
    (rows, columns), num_tokens = shape.grid, config.num_image_tokens
    num_before = shape.num_patches - rows * columns
    reason = (
        f"The projector {config.projector_type!r} makes {num_tokens} tokens of {rows}x{columns} "
        "patches, and {found}. They have no places, so attention to them cannot be drawn. Draw the "
        "'ablation' or 'gradient' map, which work on pixels."
    )
    if num_before < 0:
        raise ValueError("The tower gives the class token alone, which has no place in the image.")
    factor = _merged_side(rows, columns, num_tokens - num_before)
    if factor is None:
        raise ValueError(reason.format(found="these do not divide the grid"))
    grid = TokenGrid(rows // factor, columns // factor, num_before)
    places = [(0, 0), (0, columns - 1), (rows - 1, 0), (rows // 2, columns // 3)]
    changes = _changes(model, [num_before + row * columns + column for row, column in places])
    for (row, column), change in zip(places, changes, strict=True):
        expected = num_before + (row // factor) * grid.columns + column // factor
        if int(change.argmax()) != expected:
            raise ValueError(reason.format(found="a patch does not stay at its place"))
    if num_tokens > 1 and bool((changes > 0).all()):
        raise ValueError(reason.format(found="each of them sees the whole image"))
    return grid


def _merged_side(rows: int, columns: int, num_tokens: int) -> int | None:
    """f, if f x f patches become one token."""
    sides = [
        side for side in range(1, min(rows, columns) + 1) if not (rows % side or columns % side)
    ]
    fitting = (side for side in sides if rows * columns == num_tokens * side**2)
    return next(fitting, None)


@torch.inference_mode()
def _changes(model: MoeLlavaForConditionalGeneration, patches: list[int]) -> Tensor:
    """(patches, tokens): by how much each image token changes when one patch token does."""
    projector, shape = model.model.multi_modal_projector, model.config.projector_shape
    like = next(projector.parameters(), model.lm_head.weight)
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randn(shape.num_patches, shape.vision_width, generator=generator)
    changed = tokens.repeat(len(patches), 1, 1)
    for number, patch in enumerate(patches):
        changed[number, patch] += torch.randn(shape.vision_width, generator=generator)
    batch = torch.cat([tokens[None], changed]).to(like.device, like.dtype)
    projected: Tensor = projector(batch)
    changes: Tensor = torch.linalg.vector_norm((projected[1:] - projected[:1]).float(), dim=-1)
    return changes.cpu()
