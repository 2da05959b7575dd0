"""One trained router for every sparse layer, as Med-MoE has it: a file in, `gate` weights out.

E experts, H hidden width.
"""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import TypeAlias, cast

import torch
from torch import Tensor
from transformers import PreTrainedModel

from moellava.model.language_model.configuration_llama_moe import LlamaMoeConfig
from moellava.model.language_model.moe import LlamaMoeRouter
from moellava.storage.weights import read_weights

RouterSource: TypeAlias = str | os.PathLike[str] | Mapping[str, Tensor]


def read_router(source: RouterSource, config: LlamaMoeConfig) -> dict[str, Tensor]:
    """The weights of one router, in float32.

    Args:
        source: a safetensors file, a weights-only pickle such as Med-MoE's `phi_router.pth`, or the
            tensors themselves: one matrix (E, H) and, with `router_bias`, one vector (E,), under
            any names.

    Returns:
        `{"weight": (E, H)}`, and `"bias": (E,)` with `config.router_bias`.

    Raises:
        OSError: if there is no such file.
        ValueError: if the tensors found are not those of one router of this config.
    """
    tensors = source if isinstance(source, Mapping) else _read_file(Path(source).expanduser())
    wanted: dict[str, tuple[int, ...]] = {"weight": (config.num_experts, config.hidden_size)}
    if config.router_bias:
        wanted["bias"] = (config.num_experts,)
    router = {
        ("weight" if tensor.dim() == 2 else "bias"): tensor.detach().float()
        for tensor in tensors.values()
    }
    fits = {name: tuple(value.shape) for name, value in router.items()} == wanted
    if not fits or len(tensors) != len(wanted):
        found = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
        raise ValueError(
            f"The router holds {found}, but num_experts={config.num_experts}, "
            f"hidden_size={config.hidden_size} and router_bias={config.router_bias} need {wanted}. "
            "A router with a bias needs router_bias=True."
        )
    return router


def load_router(model: PreTrainedModel, source: RouterSource) -> None:
    """Copy one router's weights into every sparse layer of `model`, in place.

    Arguments and errors are those of `read_router`.
    """
    router = read_router(source, cast(LlamaMoeConfig, model.config.get_text_config()))
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, LlamaMoeRouter):
                for name, value in router.items():
                    module.get_parameter(name).copy_(value)


def _read_file(path: Path) -> Mapping[str, Tensor]:
    if not path.is_file():
        raise FileNotFoundError(f"There is no router file {str(path)!r}.")
    return read_weights(path)
