"""Weights on disk to weights in a module.

read_weights                    safetensors, or a pickle opened with `weights_only=True`
assign_weights                  into a module, without copying
require_fit, require_loaded     the one strict check of loading
read_index, require_own_files   the files of sharded weights, none of them outside the folder
require_covered                 the files are large enough for what a config asks for
require_finite                  what a model computed is a number
nonfinite_names                 weights that hold NaN or infinity
as_dtype, require_device        what a user asks weights to be, and where
weights_fingerprint             a short name for weights, for comparison
"""

import hashlib
import pickle
import re
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor, nn

from moellava.messages import first_names
from moellava.storage.errors import reading, reason_of
from moellava.storage.sources import WEIGHT_SUFFIXES, Source, find_file, read_json

# What training loops put a state dict under, and torch's wrappers before its names.
WRAPPERS = ("state_dict", "model", "model_state_dict", "module", "net")
NAME_PREFIXES = ("module.", "_orig_mod.")
WHOLE_FILE = "model.safetensors"


def read_weights(path: Path, prefixes: tuple[str, ...] = ("",)) -> dict[str, Tensor]:
    """Tensors whose names start with one of `prefixes`, mapped from the file, not copied.

    Names are without what DistributedDataParallel (`module.`) and torch.compile (`_orig_mod.`) add.

    Raises:
        ValueError: a truncated or foreign file, or a pickle that wants to run code.
    """
    if path.suffix == ".safetensors":
        with reading(path, "safetensors"), safe_open(path, framework="pt") as file:
            # Not a mapping: it has keys() alone.
            names = {key: _plain_name(key) for key in file.keys()}  # noqa: SIM118
            return {
                name: file.get_tensor(key)
                for key, name in names.items()
                if name.startswith(prefixes)
            }
    with reading(path, "PyTorch weights"):
        tensors = dict(_tensors(_read_pickle(path)))
    if not tensors:
        raise ValueError(f"{path} holds no tensors; expected weights, as a mapping of their names.")
    return {name: value for name, value in tensors.items() if name.startswith(prefixes)}


def read_index(path: Path) -> dict[str, str]:
    """Which file of the folder holds each tensor, by a `model.safetensors.index.json` or its like.

    Raises:
        ValueError: not an index, or one that names a file outside its folder.
    """
    weight_map = read_json(path).get("weight_map")
    if not isinstance(weight_map, dict):
        raise ValueError(f"{path} has no 'weight_map', so it is not an index of weights.")
    for name in set(map(str, weight_map.values())):
        if name in ("", ".", "..") or name != re.split(r"[/\\:]", name)[-1]:
            raise ValueError(
                f"{path} names the file {name!r}, which is not a plain name in its own folder, so "
                "it is not read. Put all files of the weights beside the index."
            )
    return {str(tensor): str(name) for tensor, name in weight_map.items()}


def require_own_files(source: Source) -> None:
    """Check, before transformers loads weights, that it will read those of this source alone.

    Raises:
        ValueError: an index names a file outside its folder; or there is an adapter, for which
            transformers would take the weights of the base that the adapter names.
    """
    if source.folder is not None:
        indexes = sorted(source.folder.glob("*.index.json"))
    else:
        is_sharded = find_file(source, WHOLE_FILE) is None
        index = _file_if_any(source, f"{WHOLE_FILE}.index.json", download=is_sharded)
        indexes = [] if index is None else [index]
    for index in indexes:
        read_index(index)
    adapter = _file_if_any(source, "adapter_config.json", download=True)
    if adapter is not None:
        raise ValueError(
            f"{adapter} is of an adapter, which is not opened with the weights beside it. Merge it "
            "into its base with PEFT's merge_and_unload, save that, and open it."
        )


def _file_if_any(source: Source, name: str, *, download: bool) -> Path | None:
    try:
        return find_file(source, name, download=download, required=False)
    except OSError:  # such as a repo without access: the loader says so, of a file that it needs
        return None


def require_covered(source: Source, num_values: int) -> None:
    """Check, before memory is spent, that the files can hold what a config asks for.

    transformers allocates weights that no file holds, and tells afterwards.

    Args:
        num_values: of all weights together.

    Raises:
        ValueError: the files have less than two bits for each.
    """
    folder = source.folder
    if folder is None:
        config = find_file(source, "config.json")
        folder = None if config is None else config.parent
    files = [
        path
        for suffix in WEIGHT_SUFFIXES
        for path in (folder.glob(f"*{suffix}") if folder is not None else ())
    ]
    size = sum(path.stat().st_size for path in files)
    if files and num_values > 4 * size:
        raise ValueError(
            f"The config.json of {source.folder or source.repo_id} asks for {num_values:,} values, "
            f"but its files of weights have {size:,} bytes. Fetch both again: they are not of one "
            "model."
        )


def nonfinite_names(weights: Mapping[str, Tensor]) -> list[str]:
    """The names of the tensors that hold NaN or infinity.

    Every value is read once, in a sum, ten times as fast as `torch.isfinite`: NaN and infinity stay
    in it. Left out are tensors without values, on the meta device, and quantised ones.
    """
    return [
        name
        for name, weight in weights.items()
        if type(weight) in (Tensor, nn.Parameter)
        and weight.is_floating_point()
        and not weight.is_meta
        and not bool(weight.sum().isfinite())  # the sum of large numbers may be infinite, too
        and not bool(weight.isfinite().all())
    ]


def as_dtype(dtype: torch.dtype | str | None) -> torch.dtype | None:
    """A dtype by itself or by its name; None for None and "auto", which leave the stored one."""
    if dtype is None or dtype == "auto":
        return None
    found = getattr(torch, dtype, None) if isinstance(dtype, str) else dtype
    if not isinstance(found, torch.dtype) or not found.is_floating_point:
        raise ValueError(
            f"dtype is {dtype!r}; give torch.float32, torch.bfloat16 or torch.float16, or their "
            "names."
        )
    return found


def require_device(device: torch.device | str | None) -> None:
    """Raise `ValueError` for a device that this machine does not have; None is any."""
    if device is None:
        return
    try:
        torch.empty(0, device=device)
    # torch raises AssertionError where it was built without the device's backend.
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        accelerator = torch.accelerator.current_accelerator(check_available=True)
        here = "cpu" if accelerator is None else f"cpu and {accelerator.type}"
        raise ValueError(
            f"device is {str(device)!r}, but this machine has {here}: {reason_of(error)}"
        ) from error


def require_finite(where: object, values: Tensor) -> None:
    """Raise `ValueError` if something that a model computed holds NaN or infinity."""
    if not bool(values.isfinite().all()):
        raise ValueError(
            f"{where} gives NaN or infinity: its weights are damaged, or {values.dtype} is too "
            "narrow for them. Fetch the weights again, or load them with dtype='float32'."
        )


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


def weights_fingerprint(state_dict: Mapping[str, Tensor]) -> str | None:
    """SHA-256 over names, shapes and the first and last 64 values of each tensor.

    Few values, so that weights which are mapped to a file are not read for it. They are rounded to
    bfloat16, so that a tower has one fingerprint in float32 and bfloat16. It is None, unknown, for
    float16, which rounds otherwise, and for weights that are offloaded.
    """
    if any(value.dtype == torch.float16 or value.is_meta for value in state_dict.values()):
        return None
    digest = hashlib.sha256()
    for name in sorted(state_dict):
        values = state_dict[name].detach().reshape(-1)
        sample = torch.cat([values[:64], values[-64:]]).to("cpu", torch.bfloat16)
        digest.update(f"{name} {tuple(state_dict[name].shape)}\n".encode())
        digest.update(sample.view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _read_pickle(path: Path, mmap: bool = True) -> object:
    try:
        return torch.load(path, map_location="cpu", weights_only=True, mmap=mmap)
    except Exception as error:
        if mmap and "mmap" in str(error):  # the format before torch 1.6 cannot be mapped
            return _read_pickle(path, mmap=False)
        if isinstance(error, pickle.UnpicklingError) and "Unsupported" in str(error):
            raise ValueError(
                f"{path} is a pickle that wants more than tensors, so it is not opened (it could "
                f"run code): {reason_of(error)} Save its state_dict as safetensors on a machine "
                "where you trust it."
            ) from error
        raise


def _tensors(state: object) -> Iterator[tuple[str, Tensor]]:
    """Named tensors of a state dict, or of a training checkpoint that holds one."""
    if not isinstance(state, Mapping):
        return
    if not any(isinstance(value, Tensor) for value in state.values()):
        state = next((state[name] for name in WRAPPERS if isinstance(state.get(name), Mapping)), {})
    for key, value in state.items():
        if isinstance(value, Tensor):
            yield _plain_name(str(key)), value


def _plain_name(name: str) -> str:
    while name.startswith(NAME_PREFIXES):
        name = name.partition(".")[2]
    return name
