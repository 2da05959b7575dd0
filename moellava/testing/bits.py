"""Equal bits of two models: `in_fresh_memory`."""

from typing import TypeVar

from torch import nn

ModuleT = TypeVar("ModuleT", bound=nn.Module)


def in_fresh_memory(module: ModuleT) -> ModuleT:
    """Copy every weight to memory of its own, which torch aligns to 64 bytes; returns the module.

    Weights that are mapped from a file stand where its header ends, such as 40 bytes past a
    multiple of 64, and the last bit of a CPU's matrix products may depend on that. Two models with
    equal weights compute equal bits, on the same machine, only if both are aligned alike.
    """
    for weight in (*module.parameters(), *module.buffers()):
        weight.data = weight.data.clone()
    return module
