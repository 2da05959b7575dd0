"""Weights on disk to weights in a module: safetensors first, then pickles, opened with `weights_only=True`.

`read_weights`, `assign_weights`, `require_loaded`.
"""

import pickle
import re
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn


def read_weights(path: Path, prefixes: tuple[str, ...] = ("",)) -> dict[str, Tensor]:
    """Tensors of a checkpoint whose names start with one of `prefixes`, mapped from the file, not copied.

    Raises:
        ValueError: a truncated or foreign file, or a pickle that wants to run code.
    """
    if path.suffix == ".safetensors":
        from safetensors import SafetensorError, safe_open

        try:
            with safe_open(path, framework="pt") as file:
                return {key: file.get_tensor(key) for key in file.keys() if key.startswith(prefixes)}  # noqa: SIM118
        except (SafetensorError, OSError) as error:
            raise ValueError(f"{path} cannot be read as safetensors; is it complete? ({error})") from error
    state = _read_pickle(path)
    tensors = dict(_tensors(state))
    if not tensors:
        raise ValueError(f"{path} holds no tensors; expected the weights of an open_clip model.")
    return {key: value for key, value in tensors.items() if key.startswith(prefixes)}


def assign_weights(module: nn.Module, state: dict[str, Tensor], *, where: str) -> None:
    """Put tensors into a module without copying them; nothing may be missing, left over or of another shape.

    Args:
        where: the file, for messages.
    """
    expected = module.state_dict()
    wrong = [
        f"{key}: {tuple(state[key].shape)} instead of {tuple(value.shape)}"
        for key, value in expected.items()
        if key in state and state[key].shape != value.shape
    ]
    if wrong:
        raise ValueError(f"{where} does not fit its config; tensors of other shapes: {first_five(wrong)}.")
    result = module.load_state_dict(state, strict=False, assign=True)
    problems = [
        f"{word} tensors: {first_five(sorted(keys))}"
        for word, keys in (("missing", result.missing_keys), ("unknown", result.unexpected_keys))
        if keys
    ]
    if problems:
        raise ValueError(f"{where} does not fit its config; {'; '.join(problems)}.")


def require_loaded(
    source: object,
    info: Mapping[str, Collection[Any]],
    kinds: Collection[str] = ("missing_keys", "unexpected_keys", "mismatched_keys"),
) -> None:
    """Raise `ValueError` for weights that did not fit; transformers only logs them, and draws missing ones at random.

    Args:
        source: what was loaded, for the message.
        info: of `from_pretrained(..., output_loading_info=True)`.
        kinds: keys of `info`.
    """
    problems = [f"{kind.replace('_', ' ')}: {first_five(sorted(map(str, info[kind])))}" for kind in kinds if info[kind]]
    if problems:
        raise ValueError(f"The weights of {source!r} do not fit its configuration. {'; '.join(problems)}.")


def first_five(names: list[str]) -> str:
    """The names as one text, shortened to five and a count."""
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")


def _read_pickle(path: Path, mmap: bool = True) -> Any:
    try:
        return torch.load(path, map_location="cpu", weights_only=True, mmap=mmap)
    except (pickle.UnpicklingError, RuntimeError, EOFError, ValueError, OSError, KeyError) as error:
        if mmap and "mmap" in str(error):  # the format before torch 1.6 cannot be mapped
            return _read_pickle(path, mmap=False)
        if isinstance(error, pickle.UnpicklingError) and "Unsupported" in str(error):
            raise ValueError(
                f"{path} is a pickle that wants more than tensors, so it is not opened (it could run code): "
                f"{_reason(error)} Save its state_dict as safetensors on a machine where you trust it."
            ) from error
        raise ValueError(
            f"{path} ({path.stat().st_size} bytes) cannot be read as PyTorch weights; is it complete? "
            f"({_reason(error)})"
        ) from error


def _reason(error: Exception) -> str:
    """The part of torch's message that says what is wrong, without its advice to load unsafely."""
    found = re.search(r"WeightsUnpickler error:\s*(.+)", str(error))
    return found[1].strip() if found else (str(error).splitlines() or [type(error).__name__])[0]


def _tensors(state: Any) -> Iterator[tuple[str, Tensor]]:
    """Named tensors of a state dict, or of open_clip's training checkpoints (names with `module.`)."""
    if isinstance(state, Mapping) and isinstance(state.get("state_dict"), Mapping):
        state = state["state_dict"]
    if isinstance(state, Mapping):
        for key, value in state.items():
            if isinstance(value, Tensor):
                yield str(key).removeprefix("module."), value
