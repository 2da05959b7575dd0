"""A language-model checkpoint on disk, tensor by tensor: a folder or hub id in, a state dict out.

Tensors are read where they are asked for and their file is closed again, so that a conversion never holds a second
copy of the model.

Public names: `CheckpointReader`, `read_state_dict`, `dense_state_dict`.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig
from transformers.utils import (
    SAFE_WEIGHTS_INDEX_NAME,
    SAFE_WEIGHTS_NAME,
    WEIGHTS_INDEX_NAME,
    WEIGHTS_NAME,
    cached_file,
)

WEIGHT_FILES = (SAFE_WEIGHTS_NAME, SAFE_WEIGHTS_INDEX_NAME, WEIGHTS_NAME, WEIGHTS_INDEX_NAME)


class CheckpointReader:
    """Names, shapes and values of the tensors of one checkpoint.

    Args:
        source: folder, or hub id; an existing folder wins.
        revision, cache_dir, local_files_only, token: as in transformers' `from_pretrained`.

    Raises:
        OSError: if there is no such folder or repository, or no weights in it.
    """

    def __init__(
        self,
        source: str | os.PathLike[str],
        *,
        revision: str | None = None,
        cache_dir: str | os.PathLike[str] | None = None,
        local_files_only: bool = False,
        token: str | bool | None = None,
    ) -> None:
        self.source = _local_or_id(source)
        self._hub: dict[str, Any] = {
            "revision": revision,
            "cache_dir": cache_dir,
            "local_files_only": local_files_only,
            "token": token,
        }
        try:
            self.config_dict: dict[str, Any] = PreTrainedConfig.get_config_dict(
                self.source, **self._hub
            )[0]
        except OSError as error:  # transformers' text does not name what was asked for
            at = f" at revision {revision}" if revision else ""
            raise OSError(f"Cannot read the config of {self.source}{at}: {error}") from error
        self.model_type: str = self.config_dict.get("model_type", "")
        self._file_of = self._find_weights()
        self._unpickled: dict[str, dict[str, Tensor]] = {}

    def config(self) -> PreTrainedConfig:
        """The checkpoint's own config, of the class that transformers has for its `model_type`."""
        return AutoConfig.from_pretrained(self.source, **self._hub)

    def names(self) -> list[str]:
        return sorted(self._file_of)

    def shape(self, name: str) -> tuple[int, ...]:
        path = self._file_of[name]
        if not path.endswith(".safetensors"):
            return tuple(self._pickled(path)[name].shape)
        with safe_open(path, framework="pt") as file:
            return tuple(file.get_slice(name).get_shape())

    def read(self, name: str, dtype: torch.dtype | None = None) -> Tensor:
        """One tensor. In the file's own dtype it stays mapped to the file and is not read before it is used."""
        path = self._file_of[name]
        if not path.endswith(".safetensors"):
            return self._pickled(path)[name].to(dtype)
        with safe_open(
            path, framework="pt"
        ) as file:  # a mapping of its own, given back with the tensor
            return file.get_tensor(name).to(dtype)

    def dtype(self) -> torch.dtype:
        """The dtype that the weights are stored in: the first floating-point tensor's."""
        return next(
            dtype for name in self.names() if (dtype := self.read(name).dtype).is_floating_point
        )

    def require(
        self, expected: Mapping[str, tuple[int, ...]], *, may_have: Callable[[str], bool]
    ) -> None:
        """Raise `ValueError` unless the checkpoint has exactly these tensors in these shapes.

        Args:
            expected: name to shape.
            may_have: whether a further name is harmless.
        """
        missing = sorted(expected.keys() - self._file_of.keys())
        unexpected = [name for name in self.names() if name not in expected and not may_have(name)]
        misshapen = [
            f"{name} is {shape}, expected {wanted}"
            for name, wanted in expected.items()
            if name in self._file_of and (shape := self.shape(name)) != wanted
        ]
        problems = [
            f"{len(found)} {kind} tensors: {', '.join(found[:3])}{', ...' if len(found) > 3 else ''}"
            for kind, found in (
                ("missing", missing),
                ("unexpected", unexpected),
                ("wrongly shaped", misshapen),
            )
            if found
        ]
        if problems:
            raise ValueError(
                f"The weights in {self.source} do not fit its config: {'; '.join(problems)}. "
                "Download or convert the checkpoint again."
            )

    def _find_weights(self) -> dict[str, str]:
        for filename in WEIGHT_FILES:
            path = self._find(filename)
            if path is not None:
                return self._names_in(path)
        raise OSError(
            f"No weights in {self.source}: expected one of {', '.join(WEIGHT_FILES)}. "
            "Check the folder, or fill the cache while there is a network."
        )

    def _find(self, filename: str) -> str | None:
        try:
            return self._locate(filename)
        except OSError:
            return None

    def _locate(self, filename: str) -> str:
        return str(cached_file(self.source, filename, **self._hub))  # OSError where there is none

    def _names_in(self, path: str) -> dict[str, str]:
        if path.endswith(".index.json"):
            weight_map = json.loads(Path(path).read_text())["weight_map"]
            shards = {shard: self._locate(shard) for shard in set(weight_map.values())}
            return {name: shards[shard] for name, shard in weight_map.items()}
        if path.endswith(".safetensors"):
            with safe_open(path, framework="pt") as file:
                return dict.fromkeys(file.keys(), path)
        return dict.fromkeys(
            torch.load(path, weights_only=True, mmap=True, map_location="cpu"), path
        )

    def _pickled(self, path: str) -> dict[str, Tensor]:
        if path not in self._unpickled:
            self._unpickled[path] = torch.load(
                path, weights_only=True, mmap=True, map_location="cpu"
            )
        return self._unpickled[path]


def read_state_dict(
    source: str | os.PathLike[str], *, dtype: torch.dtype | None = None, **hub: Any
) -> dict[str, Tensor]:
    """The state dict of a causal language model, dense or a mixture, as it is stored.

    Args:
        source: folder or hub id.
        dtype: to convert floating-point weights to; `None` keeps the file's, and then they stay mapped to it.
        **hub: as `CheckpointReader`.

    Returns:
        name to tensor, the names those of the architecture's `ForCausalLM`; without `lm_head.weight` where it is tied.

    Raises:
        OSError: if there is no such checkpoint.
        ValueError: if a tensor is missing, unexpected or of another shape than the config says.
    """
    return _read_all(CheckpointReader(source, **hub), dtype)


def dense_state_dict(
    source: str | os.PathLike[str], *, dtype: torch.dtype | None = None, **hub: Any
) -> dict[str, Tensor]:
    """As `read_state_dict`, but a mixture of experts is refused with a `ValueError`."""
    reader = CheckpointReader(source, **hub)
    if is_mixture(reader):
        raise ValueError(
            f"{reader.source} is a mixture of experts ({reader.model_type!r}), not a dense model. "
            "Load it as the mixture it is, or make it dense with moellava.model.language_model.to_dense(model)."
        )
    return _read_all(reader, dtype)


def causal_lm_shapes(config: PreTrainedConfig) -> dict[str, tuple[int, ...]]:
    """Name to shape of every weight of the config's `ForCausalLM`; without `lm_head.weight` where it is tied."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    tied = model.all_tied_weights_keys
    return {
        name: tuple(value.shape) for name, value in model.state_dict().items() if name not in tied
    }


def is_mixture(reader: CheckpointReader) -> bool:
    """Whether the checkpoint holds experts, by its config or by its tensors' names."""
    return reader.model_type == "llama_moe" or any(".experts." in name for name in reader.names())


def is_harmless(tied: Iterable[str]) -> Callable[[str], bool]:
    """Names that old or tied checkpoints hold beside the weights: rotary buffers and a tied head."""
    tied = set(tied)
    return lambda name: name.endswith("rotary_emb.inv_freq") or name in tied


def _read_all(reader: CheckpointReader, dtype: torch.dtype | None) -> dict[str, Tensor]:
    config = reader.config()
    shapes = causal_lm_shapes(config)
    reader.require(shapes, may_have=is_harmless({"lm_head.weight"} - shapes.keys()))
    keep_float32 = ("mlp.gate.weight", "mlp.gate.bias") if reader.model_type == "llama_moe" else ()
    return {
        name: reader.read(name, None if name.endswith(keep_float32) else dtype) for name in shapes
    }


def _local_or_id(source: str | os.PathLike[str]) -> str:
    path = Path(source).expanduser()
    if path.is_dir():
        return str(path)
    looks_local = isinstance(source, os.PathLike) or str(source).startswith(("/", "./", "../", "~"))
    if looks_local or not str(source):
        raise FileNotFoundError(
            f"There is no checkpoint folder {str(source)!r}. Give a folder or a hub id."
        )
    return str(source)
