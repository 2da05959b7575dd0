"""FSDP2 by torch's own `fully_shard`, on GPUs and on CPUs; accelerate has none on CPUs.

Public names: `shard`, `is_sharded`, `full_state_dict`, `full_optimizer_state`, `load_optimizer_state`.
"""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from transformers.distributed import DistributedConfig


def shard(model: Any, device: torch.device) -> None:
    """Split every weight over all processes, in place: each decoder layer a unit, the rest with the root.

    The tower and the projector stay with the root, which is gathered in every step, so that a batch without an image
    does not leave the other processes waiting.

    Raises:
        ValueError: if there is only one process.
    """
    if not dist.is_initialized() or dist.get_world_size() == 1:
        raise ValueError(
            "parallel=fsdp2 needs several processes: torchrun --nproc-per-node 8 -m moellava.cli train ..."
        )
    mesh = init_device_mesh(device.type, (dist.get_world_size(),))
    for layer in model.model.language_model.layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    model.config.distributed_config = DistributedConfig(fsdp_size=dist.get_world_size())


def is_sharded(model: nn.Module) -> bool:
    return isinstance(model, FSDPModule)


def full_state_dict(model: nn.Module) -> dict[str, Tensor]:
    """All weights, on the CPU of the first process; the others get an empty dict. Every process has to call it."""
    state: Any = get_model_state_dict(model, options=_FULL)
    return dict(state)


def full_optimizer_state(model: nn.Module, optimizer: Any) -> dict[str, Any]:
    """As `full_state_dict`, of the optimizer."""
    state: dict[str, Any] = get_optimizer_state_dict(model, optimizer, options=_FULL)
    return state


def load_optimizer_state(model: nn.Module, optimizer: Any, state: dict[str, Any]) -> None:
    """Split what `full_optimizer_state` gave, the same on every process."""
    set_optimizer_state_dict(model, optimizer, state, options=StateDictOptions(full_state_dict=True))


_FULL = StateDictOptions(full_state_dict=True, cpu_offload=True)
