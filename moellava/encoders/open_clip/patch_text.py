"""Patches of a transformer's last block → the space of its texts.

| name | what it gives |
|---|---|
| `PATCH_ATTENTION` | how the last block mixes patches: its own attention, or value-value |
| `require_projectable` | an error for towers whose patches have no way into that space |
| `last_block` | the attention asked for, while a tower runs |
| `project_patches` | patch tokens (B, N, D) → unit vectors (B, N, P) |
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Protocol

import torch
from torch import Tensor, nn

from moellava.messages import unknown_name

PATCH_ATTENTION = ("own", "value")


class _Attention(Protocol):
    """What is read of timm's `Attention`."""

    num_heads: int
    scale: float
    qkv: nn.Module
    norm: nn.Module
    proj: nn.Module


def require_projectable(visual: nn.Module, attention: str) -> None:
    """Raise `ValueError` unless each patch could take the class token's way to the texts."""
    if attention not in PATCH_ATTENTION:
        raise unknown_name("attention", attention, PATCH_ATTENTION)
    trunk = getattr(visual, "trunk", visual)
    is_timm = trunk is not visual
    is_plain = hasattr(trunk, "blocks") if is_timm else hasattr(visual, "transformer")
    if not is_plain or getattr(trunk, "attn_pool", None) is not None:
        raise ValueError(
            "Words on patches need a plain transformer without attention pooling, such as "
            f"BiomedCLIP's ViT-B/16; this tower is a {type(trunk).__name__}."
        )
    is_fused = is_timm and hasattr(trunk.get_submodule("blocks.0.attn"), "qkv")
    if attention == "value" and not is_fused:
        raise ValueError(
            "attention='value' is for timm's transformers with one qkv layer per block. "
            "Use attention='own'."
        )


@contextmanager
def last_block(visual: nn.Module, attention: str) -> Iterator[None]:
    """While it lasts, the last block of a timm trunk attends as asked."""
    if attention == "own":
        yield
        return
    *_, block = visual.get_submodule("trunk.blocks").children()
    handle = block.register_forward_hook(_value_attention)
    try:
        yield
    finally:
        handle.remove()


def _value_attention(block: nn.Module, inputs: tuple[Tensor], output: Tensor) -> Tensor:
    """The block with value-value attention, without its residual and its MLP.

    A patch then mixes with those of like content rather than with those that its query finds, which
    in the last block are much the same for all patches (CLIP Surgery, arXiv 2304.05653); what the
    residual and the MLP add is mostly noise for this purpose (ClearCLIP, arXiv 2407.12442).
    """
    attention: _Attention = block.attn  # type: ignore[assignment]
    tokens: Tensor = block.norm1(inputs[0])  # type: ignore[operator]
    num_images, num_tokens, _ = tokens.shape
    values = attention.qkv(tokens).chunk(3, dim=-1)[2]
    values = values.view(num_images, num_tokens, attention.num_heads, -1).transpose(1, 2)
    weights = (attention.scale * values @ values.transpose(-2, -1)).softmax(-1)
    mixed = (weights @ values).transpose(1, 2).flatten(2)  # (B, T, D)
    result: Tensor = attention.proj(attention.norm(mixed))
    return result


def project_patches(visual: nn.Module, patches: Tensor) -> Tensor:
    """Patches after the final norm, by the way of the class token: (B, N, D) → unit (B, N, P)."""
    if hasattr(visual, "trunk"):
        trunk = visual.trunk
        vectors: Tensor = visual.head(trunk.fc_norm(patches))  # type: ignore[operator, union-attr]
    else:
        projection = getattr(visual, "proj", None)
        vectors = patches if projection is None else patches @ projection
    return torch.nn.functional.normalize(vectors, dim=-1)
