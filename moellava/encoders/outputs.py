"""What an encoder gives, and what its trunk gives.

    B images, N patches on a grid, D width of a patch token, P width of a pooled vector

VisionEncoderOutput             of an encoder: patch tokens, after selection
TrunkOutput, LayerTokens        of `VisionEncoder.run_trunk`: the layers asked for
Shapes                          of one image's patch tokens
synthesize_patch_tokens         the fallback for towers that only pool
"""

from dataclasses import dataclass
from typing import NamedTuple

from torch import Tensor
from transformers.utils.generic import ModelOutput


@dataclass
class VisionEncoderOutput(ModelOutput):
    """Patch tokens of a batch.

    patch_tokens: (B, N, D). pooled: (B, P), or None when it was not asked for. synthesized: whether
    the patch tokens are the pooled vector repeated over the grid.
    """

    patch_tokens: Tensor | None = None
    pooled: Tensor | None = None
    synthesized: bool | None = None


class LayerTokens(NamedTuple):
    """Output of one layer: class token (B, 1, D) or None, patches (B, N, D); no registers."""

    class_token: Tensor | None
    patches: Tensor
    grid: tuple[int, int]  # rows, columns; rows * columns = N


class TrunkOutput(NamedTuple):
    """What `run_trunk` returns: the layers asked for, in that order, and (B, P) if asked for."""

    layers: list[LayerTokens]
    pooled: Tensor | None = None


class Shapes(NamedTuple):
    """What comes out per image: (rows, columns) of patches, N tokens, D their width."""

    grid: tuple[int, int]
    num_patches: int
    hidden_size: int


def synthesize_patch_tokens(pooled: Tensor, num_patches: int) -> Tensor:
    """Repeat one vector per image over a grid: (B, P) -> (B, num_patches, P).

    The fallback for a tower without spatial tokens. All patches of an image are equal, so a model
    behind it knows what the image shows but not where.
    """
    if pooled.ndim != 2:
        raise ValueError(f"pooled has shape {tuple(pooled.shape)}; expected (images, width).")
    if num_patches < 1:
        raise ValueError(f"num_patches is {num_patches}; expected at least 1.")
    return pooled.unsqueeze(1).expand(-1, num_patches, -1).contiguous()
