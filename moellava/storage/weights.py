"""Weights on disk to weights in a module.

read_weights                    safetensors, or a pickle opened with `weights_only=True`
assign_weights                  into a module, without copying
require_fit, require_loaded     the one strict check of loading
"""

import pickle
import re
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from moellava.messages import first_names


def read_weights(path: Path, prefixes: tuple[str, ...] = ("",)) -> dict[str, Tensor]:
    """Tensors whose names start with one of `prefixes`, mapped from the file, not copied.

    Raises:
        ValueError: a truncated or foreign file, or a pickle that wants to run code.
    """
    if path.suffix == ".safetensors":
        from safetensors import SafetensorError, safe_open

        try:
            with safe_open(path, framework="pt") as file:
                return {
                    key: file.get_tensor(key)
                    for key in file.keys()  # noqa: SIM118  (not a mapping: it has keys() alone)
                    if key.startswith(prefixes)
                }
        except (SafetensorError, OSError) as error:
            raise ValueError(
                f"{path} cannot be read as safetensors; is it complete? ({error})"
            ) from error
    state = _read_pickle(path)
    tensors = dict(_tensors(state))
    if not tensors:
        raise ValueError(f"{path} holds no tensors; expected the weights of an open_clip model.")
    return {key: value for key, value in tensors.items() if key.startswith(prefixes)}


def assign_weights(module: nn.Module, state: dict[str, Tensor], *, where: object) -> None:
    """Put tensors into a module without copying; none may be missing, unexpected or misshapen.

    Args:
        where: the file, for messages.
    """
    mismatched = [
        f"{key}: {tuple(state[key].shape)} instead of {tuple(value.shape)}"
        for key, value in module.state_dict().items()
        if key in state and state[key].shape != value.shape
    ]
    require_fit(where, mismatched=mismatched)
    result = module.load_state_dict(state, strict=False, assign=True)
    require_fit(where, missing=result.missing_keys, unexpected=result.unexpected_keys)


def require_loaded(where: object, info: Mapping[str, Collection[object]]) -> None:
    """`require_fit` for what `from_pretrained(..., output_loading_info=True)` returned.

    transformers only logs these problems, and leaves missing parameters uninitialised.
    """
    require_fit(
        where,
        missing=info.get("missing_keys", ()),
        unexpected=info.get("unexpected_keys", ()),
        mismatched=info.get("mismatched_keys", ()),
        errors=info.get("error_msgs", ()),
    )


def require_fit(
    where: object,
    *,
    missing: Collection[object] = (),
    unexpected: Collection[object] = (),
    mismatched: Collection[object] = (),
    errors: Collection[object] = (),
) -> None:
    """The one strict check of loading: every tensor has its place, and every place its tensor.

    Args:
        where: what was loaded, for the message.

    Raises:
        ValueError: if anything is given; the first five names of each kind are listed.
    """
    kinds = (
        ("missing keys", missing),
        ("unexpected keys", unexpected),
        ("mismatched keys", mismatched),
        ("errors", errors),
    )
    problems = [f"{kind}: {first_names(sorted(map(str, names)))}" for kind, names in kinds if names]
    if problems:
        raise ValueError(
            f"The weights of {where} do not fit its configuration. {'; '.join(problems)}."
        )


def _read_pickle(path: Path, mmap: bool = True) -> object:
    try:
        return torch.load(path, map_location="cpu", weights_only=True, mmap=mmap)
    except (pickle.UnpicklingError, RuntimeError, EOFError, ValueError, OSError, KeyError) as error:
        if mmap and "mmap" in str(error):  # the format before torch 1.6 cannot be mapped
            return _read_pickle(path, mmap=False)
        if isinstance(error, pickle.UnpicklingError) and "Unsupported" in str(error):
            raise ValueError(
                f"{path} is a pickle that wants more than tensors, so it is not opened (it could "
                f"run code): {_reason(error)} Save its state_dict as safetensors on a machine "
                "where you trust it."
            ) from error
        raise ValueError(
            f"{path} ({path.stat().st_size} bytes) cannot be read as PyTorch weights; is it "
            f"complete? ({_reason(error)})"
        ) from error


def _reason(error: Exception) -> str:
    """The part of torch's message that says what is wrong, without its advice to load unsafely."""
    found = re.search(r"WeightsUnpickler error:\s*(.+)", str(error))
    return found[1].strip() if found else (str(error).splitlines() or [type(error).__name__])[0]


def _tensors(state: object) -> Iterator[tuple[str, Tensor]]:
    """Named tensors of a state dict, or of open_clip's training checkpoints (`module.` names)."""
    if isinstance(state, Mapping) and isinstance(state.get("state_dict"), Mapping):
        state = state["state_dict"]
    if isinstance(state, Mapping):
        for key, value in state.items():
            if isinstance(value, Tensor):
                yield str(key).removeprefix("module."), value
