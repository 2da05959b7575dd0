"""A loss, gradient or weight that is not finite: find where it began.

| name | what it finds |
|---|---|
| `first_nonfinite_module` | the module that gave NaN or infinity first |
| `nonfinite_tensors` | the tensors of a model that hold some |
"""

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.utils.hooks import RemovableHandle


def first_nonfinite_module(model: nn.Module, inputs: Mapping[str, object]) -> str | None:
    """The first module, in the order of computing, whose output holds NaN or infinity, if any.

    Runs the batch once more without gradients.
    """
    found: list[str] = []
    handles: list[RemovableHandle] = []
    for name, module in model.named_modules():

        def look(_module: nn.Module, _inputs: object, output: object, name: str = name) -> None:
            if not found and any(not bool(tensor.isfinite().all()) for tensor in _tensors(output)):
                found.append(name)

        handles.append(module.register_forward_hook(look))
    try:
        with torch.no_grad():
            model(**inputs)
    finally:
        for handle in handles:
            handle.remove()
    return found[0] if found else None


def nonfinite_tensors(named: Iterable[tuple[str, Tensor | None]], limit: int = 3) -> list[str]:
    """The names of the first few tensors that hold NaN or infinity.

    Of a sharded tensor, this process looks at its part: the whole would wait for processes that
    see nothing wrong.
    """
    found = []
    for name, tensor in named:
        if isinstance(tensor, DTensor):
            tensor = tensor.to_local()
        if tensor is not None and tensor.is_floating_point() and not bool(tensor.isfinite().all()):
            found.append(name)
            if len(found) == limit:
                break
    return found


def _tensors(output: object) -> Iterable[Tensor]:
    if isinstance(output, Tensor):
        if output.is_floating_point():
            yield output
    elif isinstance(output, Mapping):
        for value in output.values():
            yield from _tensors(value)
    elif isinstance(output, list | tuple):
        for value in output:
            yield from _tensors(value)
