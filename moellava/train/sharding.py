"""FSDP2 by torch's own `fully_shard`, on GPUs and on CPUs; accelerate has none on CPUs.

| name | what it does |
|---|---|
| `shard`, `is_sharded` | split a model over the processes; whether it is |
| `save_model`, `load_checkpoint` | whole weights out and in |
| `full_optimizer_state`, `load_optimizer_state` | the same for the optimizer |
| `decoder_layer_class` | what accelerate's own FSDP is to wrap |
"""

from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors.torch import load_file, load_model
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard, register_fsdp_forward_method
from torch.optim import Optimizer
from transformers.distributed.configuration_utils import DistributedConfig

from moellava.model.modeling_moellava import MoeLlavaForConditionalGeneration
from moellava.storage.errors import reading


def shard(model: MoeLlavaForConditionalGeneration, device: torch.device) -> None:
    """Split every weight over all processes, in place, each decoder layer a unit.

    The tower and the projector stay with the root, which is gathered in every step, so that a batch
    without an image does not leave the other processes waiting.

    Raises:
        ValueError: if there is only one process.
    """
    if not dist.is_initialized() or dist.get_world_size() == 1:
        raise ValueError(
            "parallel=fsdp2 needs several processes: torchrun --nproc-per-node 8 -m moellava.cli "
            "train ..."
        )
    mesh = init_device_mesh(device.type, (dist.get_world_size(),))
    for layer in model.model.language_model.layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    # Held-out questions have their images encoded outside the model's forward pass.
    register_fsdp_forward_method(model, "get_image_features")
    model.config.distributed_config = DistributedConfig(fsdp_size=dist.get_world_size())


def is_sharded(model: nn.Module) -> bool:
    """Whether `shard` split this model."""
    return isinstance(model, FSDPModule)


def decoder_layer_class(model: MoeLlavaForConditionalGeneration) -> str:
    """What accelerate's FSDP is to wrap.

    It refuses a name that the model does not have, and a mixture's layers are of another class.
    """
    return type(model.model.language_model.layers[0]).__name__


def load_checkpoint(model: nn.Module, checkpoint: Path) -> None:
    """Read what `save_model` wrote, before the model is split.

    Args:
        model: what is trained; a PEFT model reads its adapters alone.
    """
    with reading(checkpoint, "a checkpoint"):
        if not _has_adapters(model):
            load_model(model, checkpoint / "model.safetensors")
            return
        from peft import set_peft_model_state_dict

        set_peft_model_state_dict(model, load_file(checkpoint / "adapter_model.safetensors"))


def save_model(
    model: Any, base: MoeLlavaForConditionalGeneration, folder: Path, *, should_save: bool
) -> None:
    """Write whole weights, or those of the adapters. Every process has to call it.

    Args:
        model: what is trained; `base` itself, or a PEFT model around it.
        base: what was given to `shard`.
        should_save: whether this process writes; the weights are gathered on the CPU of the first.
    """
    options = StateDictOptions(
        full_state_dict=True, cpu_offload=True, ignore_frozen_params=_has_adapters(model)
    )
    state_dict = get_model_state_dict(model, options=options)
    if should_save:
        distributed, base.config.distributed_config = base.config.distributed_config, None
        model.save_pretrained(str(folder), state_dict=state_dict)
        base.config.distributed_config = distributed


def full_optimizer_state(model: nn.Module, optimizer: Optimizer) -> dict[str, Any]:
    """The whole state, on the CPU of the first process. Every process has to call it."""
    options = StateDictOptions(full_state_dict=True, cpu_offload=True)
    return get_optimizer_state_dict(model, optimizer, options=options)


def load_optimizer_state(model: nn.Module, optimizer: Optimizer, state: dict[str, Any]) -> None:
    """Split what `full_optimizer_state` gave, the same on every process."""
    set_optimizer_state_dict(
        model, optimizer, state, options=StateDictOptions(full_state_dict=True)
    )


def _has_adapters(model: nn.Module) -> bool:
    return hasattr(model, "peft_config")
