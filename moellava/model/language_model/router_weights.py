"""One trained router for every sparse layer, as Med-MoE has it: a file in, `gate` weights out.

E experts, H hidden width.

read_router, load_router   a router's weights, checked; into every layer of a model
write_router               its file, with the layers that it was trained for and the experts' labels
router_facts               what such a file says besides the weights
"""

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple, TypeAlias, cast

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor
from transformers import PreTrainedModel

from moellava.model.language_model.configuration_llama_moe import LlamaMoeConfig
from moellava.model.language_model.moe import LlamaMoeRouter
from moellava.storage.errors import reading
from moellava.storage.weights import read_weights
from moellava.storage.writing import replacing

RouterSource: TypeAlias = str | os.PathLike[str] | Mapping[str, Tensor]


class RouterFacts(NamedTuple):
    """What a router's file says besides the weights; None if it does not."""

    layers: list[int] | None = None  # whose hidden states it was trained on
    labels: list[str] | None = None  # what each expert serves, in the experts' order


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
        ValueError: if the tensors found are not those of one router of this config, or were trained
            for other layers than its sparse ones.
    """
    layers = router_facts(source).layers
    if layers is not None and layers != config.moe_layer_indices:
        raise ValueError(
            f"The router {source} was trained for the layers {layers}, but the sparse layers are "
            f"{config.moe_layer_indices}. Set moe_layers={layers}, or train a router for these."
        )
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


def router_facts(source: RouterSource | None) -> RouterFacts:
    """The layers and labels that `write_router` put into a file; nothing for other sources."""
    if source is None or isinstance(source, Mapping) or not str(source).endswith(".safetensors"):
        return RouterFacts()
    path = Path(source).expanduser()
    if not path.is_file():
        return RouterFacts()  # `read_router` says so
    with reading(path, "a router"), safe_open(path, framework="pt") as file:
        found = file.metadata() or {}
        return RouterFacts(*(json.loads(found.get(name, "null")) for name in RouterFacts._fields))


def write_router(
    path: str | os.PathLike[str],
    weights: Mapping[str, Tensor],
    *,
    layers: Sequence[int],
    labels: Sequence[str],
) -> None:
    """Write a router's safetensors file.

    Args:
        weights: `weight` (E, H) and `bias` (E,).
        layers: whose hidden states it was trained on, the mixture's sparse layers.
        labels: what each expert serves, in the experts' order.
    """
    metadata = {"layers": json.dumps(list(layers)), "labels": json.dumps(list(labels))}
    tensors = {name: value.detach().contiguous() for name, value in weights.items()}
    with replacing(path) as part:
        save_file(tensors, part, metadata={"format": "pt"} | metadata)


def load_router(model: PreTrainedModel, source: RouterSource) -> None:
    """Copy one router's weights into every sparse layer of `model`, in place.

    Arguments and errors are those of `read_router`.
    """
    config = cast(LlamaMoeConfig, model.config.get_text_config())
    router = read_router(source, config)
    config.expert_labels = router_facts(source).labels or config.expert_labels
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, LlamaMoeRouter):
                for name, value in router.items():
                    module.get_parameter(name).copy_(value)


def _read_file(path: Path) -> Mapping[str, Tensor]:
    if not path.is_file():
        raise FileNotFoundError(f"There is no router file {str(path)!r}.")
    return read_weights(path)
