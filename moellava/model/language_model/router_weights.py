"""One trained router for every sparse layer, as Med-MoE trains it: a file or tensors in, `gate` weights out.

E experts, H hidden width.

Public names: `read_router`, `load_router`, `RouterSource`.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, TypeAlias, cast

import torch
from safetensors.torch import load_file
from torch import Tensor

from moellava.model.language_model.configuration_llama_moe import LlamaMoeConfig
from moellava.model.language_model.moe import LlamaMoeRouter

if TYPE_CHECKING:
    from transformers import PreTrainedModel

RouterSource: TypeAlias = "str | os.PathLike[str] | Mapping[str, Tensor]"


def read_router(source: RouterSource, config: LlamaMoeConfig) -> dict[str, Tensor]:
    """The weights of one router, in float32.

    Args:
        source: a safetensors file, a weights-only pickle such as Med-MoE's `phi_router.pth`, or the tensors
            themselves: one matrix (E, H) and, with `router_bias`, one vector (E,), under any names.

    Returns:
        `{"weight": (E, H)}`, and `"bias": (E,)` with `config.router_bias`.

    Raises:
        OSError: if there is no such file.
        ValueError: if the tensors found are not those of one router of this config; both shapes are given.
    """
    if isinstance(source, Mapping):
        tensors: Mapping[str, Tensor] = source
    elif not Path(source).expanduser().is_file():
        raise FileNotFoundError(f"There is no router file {str(source)!r}.")
    elif str(source).endswith(".safetensors"):
        tensors = load_file(Path(source).expanduser())
    else:
        tensors = torch.load(Path(source).expanduser(), weights_only=True, map_location="cpu")
    wanted: dict[str, tuple[int, ...]] = {"weight": (config.num_experts, config.hidden_size)}
    if config.router_bias:
        wanted["bias"] = (config.num_experts,)
    router = {
        ("weight" if tensor.dim() == 2 else "bias"): tensor.detach().float()
        for tensor in tensors.values()
    }
    found = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    if (
        len(tensors) != len(wanted)
        or {name: tuple(value.shape) for name, value in router.items()} != wanted
    ):
        raise ValueError(
            f"The router holds {found}, but num_experts={config.num_experts}, hidden_size={config.hidden_size} and "
            f"router_bias={config.router_bias} need {wanted}. "
            "A router with a bias needs router_bias=True."
        )
    return router


def load_router(model: PreTrainedModel, source: RouterSource) -> None:
    """Copy one router's weights into every sparse layer of `model`, in place. Args and errors: as `read_router`."""
    router = read_router(source, cast(LlamaMoeConfig, model.config.get_text_config()))
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, LlamaMoeRouter):
                for name, value in router.items():
                    getattr(module, name).copy_(value)
