"""A language-model checkpoint on disk, tensor by tensor: a folder or hub id in, a state dict out.

Tensors are read when they are asked for and their file is closed again, so that a conversion never
holds a second copy of the model.

read_state_dict, dense_state_dict   all weights of a checkpoint
CheckpointReader                    names, shapes and values, one tensor at a time
TensorReader                        what upcycling needs of a reader
"""

import os
from collections.abc import Callable, Collection, Iterator, Mapping
from pathlib import Path
from typing import Any, Protocol, TypeAlias

import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel
from transformers.utils import (
    SAFE_WEIGHTS_INDEX_NAME,
    SAFE_WEIGHTS_NAME,
    WEIGHTS_INDEX_NAME,
    WEIGHTS_NAME,
)
from transformers.utils.hub import cached_file
from typing_extensions import Unpack

from moellava.storage.errors import reading
from moellava.storage.limits import require_bounded
from moellava.storage.sources import HubKeywords, HubOptions, parse_source
from moellava.storage.weights import read_index, read_weights, require_fit

WEIGHT_FILES = (SAFE_WEIGHTS_NAME, SAFE_WEIGHTS_INDEX_NAME, WEIGHTS_NAME, WEIGHTS_INDEX_NAME)

Shape: TypeAlias = tuple[int, ...]


class TensorReader(Protocol):
    """A causal language model whose tensors are read one at a time."""

    source: str  # what is read, for messages

    def config(self) -> PreTrainedConfig: ...

    def names(self) -> list[str]: ...

    def shape(self, name: str) -> Shape: ...

    def read(self, name: str, dtype: torch.dtype | None = None) -> Tensor: ...


class CheckpointReader:
    """Names, shapes and values of the tensors of one checkpoint.

    Args:
        source: folder, or hub id; an existing folder wins.

    Raises:
        OSError: if there is no such folder or repository, or no weights in it.
        ValueError: if a file of it cannot be read.
    """

    def __init__(self, source: str | os.PathLike[str], hub: HubOptions | None = None) -> None:
        self.hub = hub or HubOptions()
        self.source = _folder_or_id(source)
        self._config_file = Path(self.source) / "config.json"  # a name for messages if on the hub
        try:
            with reading(self._config_file, "a config"):
                found, _ = PreTrainedConfig.get_config_dict(self.source, **self.hub.keywords)
        except OSError as error:  # transformers' text does not name what was asked for
            at = f" at revision {self.hub.revision}" if self.hub.revision else ""
            raise OSError(f"Cannot read the config of {self.source}{at}: {error}") from error
        if not isinstance(found, dict):
            kind = type(found).__name__
            raise ValueError(f"{self._config_file} holds a JSON {kind}; expected an object.")
        require_bounded(f"the config of {self.source}", found)
        self.config_dict: dict[str, Any] = found
        self.model_type = str(found.get("model_type", ""))
        self._file_of = self._find_weights()
        self._unpickled: dict[Path, dict[str, Tensor]] = {}

    def config(self) -> PreTrainedConfig:
        """The checkpoint's own config, of the class that transformers has for its `model_type`."""
        with reading(self._config_file, "a config"):
            config: PreTrainedConfig = AutoConfig.from_pretrained(
                self.source, trust_remote_code=False, **self.hub.keywords
            )
        return config

    def expected_shapes(self, config: PreTrainedConfig | None = None) -> dict[str, Shape]:
        """`causal_lm_shapes` of the checkpoint's config, or of one that was made of it."""
        config = config or self.config()
        with reading(self._config_file, "the config of a model"):
            return causal_lm_shapes(config)

    def names(self) -> list[str]:
        return sorted(self._file_of)

    def shape(self, name: str) -> Shape:
        return tuple(self._mapped(name).shape)

    def read(self, name: str, dtype: torch.dtype | None = None) -> Tensor:
        """One tensor; in the file's own dtype it stays mapped to the file until it is used."""
        tensor = self._mapped(name)
        return tensor if dtype is None else tensor.to(dtype)

    def dtype(self) -> torch.dtype:
        """The dtype that the weights are stored in: the first floating-point tensor's."""
        for name in self.names():
            dtype = self.read(name).dtype
            if dtype.is_floating_point:
                return dtype
        raise ValueError(f"The weights in {self.source} are all integers; expected numbers.")

    def _mapped(self, name: str) -> Tensor:
        path = self._file_of[name]
        if path.suffix == ".safetensors":
            # A mapping of its own, which is given back with the tensor.
            tensors = read_weights(path, (name,))
        else:
            if path not in self._unpickled:
                self._unpickled[path] = read_weights(path)
            tensors = self._unpickled[path]
        if name not in tensors:
            raise ValueError(f"{path} has no tensor {name!r}, but the index beside it says so.")
        return tensors[name]

    def _find_weights(self) -> dict[str, Path]:
        for filename in WEIGHT_FILES:
            path = self._find(filename)
            if path is not None:
                return self._names_in(path)
        raise OSError(
            f"No weights in {self.source}: expected one of {', '.join(WEIGHT_FILES)}. "
            "Check the folder, or fill the cache on a machine with a network."
        )

    def _find(self, filename: str) -> Path | None:
        try:
            return self._locate(filename)
        except OSError:
            return None

    def _locate(self, filename: str) -> Path:
        """The path of a file that must be there; `OSError` if it is not."""
        with reading(Path(self.source) / filename):
            return Path(str(cached_file(self.source, filename, **self.hub.keywords)))

    def _names_in(self, path: Path) -> dict[str, Path]:
        if path.suffix != ".json":
            return dict.fromkeys(read_weights(path), path)
        weight_map = read_index(path)
        shards = {shard: self._locate(shard) for shard in set(weight_map.values())}
        return {name: shards[shard] for name, shard in weight_map.items()}


def read_state_dict(
    source: str | os.PathLike[str],
    *,
    dtype: torch.dtype | None = None,
    **hub: Unpack[HubKeywords],
) -> dict[str, Tensor]:
    """The state dict of a causal language model, dense or a mixture, as it is stored.

    Args:
        source: folder or hub id.
        dtype: to convert floating-point weights to; `None` keeps the file's, and then the weights
            stay mapped to it.
        **hub: as in transformers' `from_pretrained`.

    Returns:
        name to tensor, the names those of the architecture's `ForCausalLM`; without
        `lm_head.weight` if it is tied.

    Raises:
        OSError: if there is no such checkpoint.
        ValueError: if a tensor is missing, unexpected or of another shape than the config says.
    """
    return dict(read_tensors(source, dtype=dtype, **hub))


def read_tensors(
    source: str | os.PathLike[str],
    *,
    dtype: torch.dtype | None = None,
    **hub: Unpack[HubKeywords],
) -> Iterator[tuple[str, Tensor]]:
    """As `read_state_dict`, one tensor at a time."""
    return _read_all(CheckpointReader(source, HubOptions(**hub)), dtype)


def dense_state_dict(
    source: str | os.PathLike[str],
    *,
    dtype: torch.dtype | None = None,
    **hub: Unpack[HubKeywords],
) -> dict[str, Tensor]:
    """As `read_state_dict`, but a mixture of experts is refused with a `ValueError`."""
    return dict(dense_tensors(source, dtype=dtype, **hub))


def dense_tensors(
    source: str | os.PathLike[str],
    *,
    dtype: torch.dtype | None = None,
    **hub: Unpack[HubKeywords],
) -> Iterator[tuple[str, Tensor]]:
    """As `dense_state_dict`, one tensor at a time."""
    reader = CheckpointReader(source, HubOptions(**hub))
    if is_mixture(reader):
        raise ValueError(
            f"{reader.source} is a mixture of experts ({reader.model_type!r}), not a dense model. "
            "Load it as the mixture it is, or make it dense with "
            "moellava.model.language_model.to_dense(model)."
        )
    return _read_all(reader, dtype)


def causal_lm_shapes(config: PreTrainedConfig) -> dict[str, Shape]:
    """Name to shape of every weight of the config's `ForCausalLM`, without a tied `lm_head`."""
    with torch.device("meta"):
        model: PreTrainedModel = AutoModelForCausalLM.from_config(config, trust_remote_code=False)
    tied = model.all_tied_weights_keys
    return {
        name: tuple(value.shape) for name, value in model.state_dict().items() if name not in tied
    }


def require_float(dtype: torch.dtype | None) -> None:
    """Raise `ValueError` for a dtype that weights cannot be computed in; None keeps the file's."""
    if dtype is not None and not dtype.is_floating_point:
        raise ValueError(
            f"dtype is {dtype}; give torch.float32, torch.bfloat16 or torch.float16. For 8-bit "
            "weights, give load_in_8bit=True to load_pretrained_model."
        )


def is_mixture(reader: CheckpointReader) -> bool:
    """Whether the checkpoint holds experts, by its config or by its tensors' names."""
    return reader.model_type == "llama_moe" or any(".experts." in name for name in reader.names())


def is_harmless(shapes: Collection[str]) -> Callable[[str], bool]:
    """Names that old or tied checkpoints hold besides `shapes`: rotary buffers and a tied head."""
    tied = {"lm_head.weight"} - set(shapes)
    return lambda name: name.endswith("rotary_emb.inv_freq") or name in tied


def require_tensors(
    reader: TensorReader, expected: Mapping[str, Shape], *, may_have: Callable[[str], bool]
) -> None:
    """Raise `ValueError` unless the checkpoint has exactly these tensors in these shapes.

    Args:
        expected: name to shape.
        may_have: whether a further name is harmless.
    """
    found = set(reader.names())
    mismatched = [
        f"{name}: {shape} instead of {wanted}"
        for name, wanted in expected.items()
        if name in found and (shape := reader.shape(name)) != wanted
    ]
    require_fit(
        reader.source,
        missing=expected.keys() - found,
        unexpected=[name for name in found - expected.keys() if not may_have(name)],
        mismatched=mismatched,
    )


def _read_all(reader: CheckpointReader, dtype: torch.dtype | None) -> Iterator[tuple[str, Tensor]]:
    require_float(dtype)
    shapes = reader.expected_shapes()
    require_tensors(reader, shapes, may_have=is_harmless(shapes))
    keep_float32 = ("mlp.gate.weight", "mlp.gate.bias") if reader.model_type == "llama_moe" else ()
    return (
        (name, reader.read(name, None if name.endswith(keep_float32) else dtype)) for name in shapes
    )


def _folder_or_id(spec: str | os.PathLike[str]) -> str:
    source = parse_source(spec)
    if source.file is not None:
        raise NotADirectoryError(f"{source.file} is a file. Give its folder, {source.folder}.")
    return str(source.folder or source.repo_id)
