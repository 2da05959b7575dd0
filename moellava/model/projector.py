"""Patch tokens (B, N, D_vision) → image embeddings (B, M, D_text) in the language model's space."""

import re
from collections.abc import Callable

from torch import nn

from moellava.messages import unknown_name

ProjectorBuilder = Callable[[int, int], nn.Module]


def build_projector(projector_type: str, vision_width: int, text_width: int) -> nn.Module:
    """Build an untrained projector.

    Args:
        projector_type: `identity`, `linear` or `mlpNx_gelu` for N >= 1 (N linear layers with GELU between
            them; `mlp2x_gelu` is LLaVA-1.5's). The keys of the last are those of the original LLaVA's
            `mm_projector`: `0.weight`, `0.bias`, `2.weight`, ...
        vision_width: channels of a patch token, D_vision.
        text_width: channels of a token embedding, D_text.

    Raises:
        ValueError: for an unknown type, or an identity between different widths.
    """
    return _builder(projector_type)(vision_width, text_width)


def num_projected_tokens(projector_type: str, num_patches: int) -> int:
    """Image embeddings that a projector returns for one image of `num_patches` patch tokens."""
    _builder(projector_type)  # every projector here works token by token
    return num_patches


def _builder(projector_type: str) -> ProjectorBuilder:
    if projector_type in PROJECTORS:
        return PROJECTORS[projector_type]
    if match := re.fullmatch(r"mlp([1-9]\d*)x_gelu", projector_type):
        num_layers = int(match.group(1))
        return lambda vision_width, text_width: _build_mlp(num_layers, vision_width, text_width)
    raise unknown_name("projector_type", projector_type, [*PROJECTORS, "mlp2x_gelu"])


def _build_identity(vision_width: int, text_width: int) -> nn.Module:
    if vision_width != text_width:
        raise ValueError(
            f"projector_type 'identity' keeps the width, but patch tokens have {vision_width} channels and the "
            f"language model's embeddings {text_width}. Use projector_type='linear' or 'mlp2x_gelu'."
        )
    return nn.Identity()


def _build_mlp(num_layers: int, vision_width: int, text_width: int) -> nn.Module:
    layers: list[nn.Module] = [nn.Linear(vision_width, text_width)]
    for _ in range(num_layers - 1):
        layers += [nn.GELU(), nn.Linear(text_width, text_width)]
    return nn.Sequential(*layers)


PROJECTORS: dict[str, ProjectorBuilder] = {"identity": _build_identity, "linear": nn.Linear}
