"""A model as its difference from the published parts: projector, mixture layers, adapters and whatever was trained.

`save_trainable` compares the model with the base (image tower and language model as they are published) and writes
only what the base does not hold bit for bit; `load_trainable` reads the base, checks that it is the same one, and
puts the difference on top.

Public names: `save_trainable`, `load_trainable`, `is_trainable_folder`.
"""

import hashlib
import json
import logging
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import GenerationConfig, PreTrainedModel

from moellava.encoders import create_encoder
from moellava.encoders.factory import encoder_kinds
from moellava.messages import first_names, unknown_name
from moellava.model.checkpoint.configs import model_type_of
from moellava.model.checkpoint.llava import read_llava
from moellava.model.checkpoint.strict import load_weights
from moellava.model.configuration_moellava import MoeLlavaConfig
from moellava.model.language_model import imported_state_dict, read_state_dict
from moellava.model.language_model.mixtures import LAYOUTS
from moellava.model.loaded_model import LoadedModel
from moellava.model.modeling_moellava import (
    TOWER_PREFIX,
    MoeLlavaForConditionalGeneration,
    joined_name,
)
from moellava.model.processing_moellava import MoeLlavaProcessor
from moellava.storage.sources import Origin

logger = logging.getLogger(__name__)

WEIGHTS_FILE = "trainable.safetensors"
BASE_FILE = "base.json"
ADAPTER_FOLDER = "adapter"
ADDED_ROWS = ".added_rows"  # rows of an embedding beyond the base's vocabulary, saved alone
# The two parts of a base, under the keys that users know; the prefix of their weights' names.
PARTS = {"model_name_or_path": "language model", "mm_vision_tower": "vision tower"}


def save_trainable(
    model: PreTrainedModel | LoadedModel,
    folder: str | os.PathLike[str],
    *,
    processor: MoeLlavaProcessor | None = None,
    base: Mapping[str, str | os.PathLike[str]] | None = None,
    **hub: Any,
) -> list[str]:
    """Write what a model does not share with its base: projector, mixtures, adapters, and all that was trained.

    Args:
        model: a `LoadedModel`, a `MoeLlavaForConditionalGeneration`, or a PEFT model around one; an adapter that is
            not merged goes into the folder `adapter`, in PEFT's own files.
        folder: created if missing; receives `config.json`, `base.json`, `trainable.safetensors` and the processor.
        processor: of the model, where `model` is no `LoadedModel`.
        base: where the parts are on this machine, if this process did not build the model from them and they are not
            under the ids in its config: `{"model_name_or_path": ..., "mm_vision_tower": ...}`, one or both. Paths are
            used and not saved.
        **hub: `cache_dir`, `local_files_only`, as in transformers.

    Returns:
        The names of the saved weights.

    Raises:
        OSError: if the base cannot be read; it is needed, to tell what differs from it.
        ValueError: if the config does not say what the base is, or the weights are quantised.
    """
    adapted: Any = model
    if isinstance(model, LoadedModel):
        adapted, processor = model.model, processor or model.processor
    has_adapter = hasattr(adapted, "peft_config")
    if has_adapter and not hasattr(adapted, "get_base_model"):
        raise ValueError(
            "The model has an adapter inside, from add_adapter. Use peft.get_peft_model(model, config)."
        )
    own: Any = adapted.get_base_model() if has_adapter else adapted
    if getattr(own, "hf_quantizer", None) is not None:
        raise ValueError(
            "The model's weights are quantised, so that hardly any equals the base's. Save it whole with "
            "save_pretrained, or train and save it without load_in_8bit."
        )
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    state = _own_state_dict(own)
    base_state = _read_base(own.config, {**(own.built_from or {}), **(base or {})}, **hub)
    difference = dict(_difference(state, base_state, own.dtype))

    # Written beside and then moved: the model may be mapped to the very file that is replaced.
    save_file(difference, folder / f"{WEIGHTS_FILE}.part", metadata={"format": "pt"})
    os.replace(folder / f"{WEIGHTS_FILE}.part", folder / WEIGHTS_FILE)
    shared = {
        name: tensor
        for name, tensor in base_state.items()
        if name in state and name not in difference
    }
    description = {
        PARTS[key]: {"name": origin.name, "revision": origin.revision, "sha256": checksum}
        for (key, origin), checksum in zip(
            _origins(own.config).items(), _checksums(shared), strict=True
        )
    }
    (folder / BASE_FILE).write_text(json.dumps(description, indent=2) + "\n")
    own.config.save_pretrained(folder)
    if own.generation_config is not None:
        own.generation_config.save_pretrained(folder)
    if processor is not None:
        processor.save_pretrained(folder)
    if has_adapter:
        adapted.save_pretrained(str(folder / ADAPTER_FOLDER))
    logger.info(
        "%s: %d of %d tensors differ from the base, %d of %d bytes",
        folder,
        len(difference),
        len(state),
        sum(tensor.nbytes for tensor in difference.values()),
        sum(tensor.nbytes for tensor in state.values()),
    )
    return sorted(difference)


def load_trainable(
    folder: str | os.PathLike[str],
    *,
    base: Mapping[str, str | os.PathLike[str]] | None = None,
    dtype: torch.dtype | None = None,
    attn_implementation: str | None = None,
    quantization_config: Any = None,
    **hub: Any,
) -> LoadedModel:
    """Open what `save_trainable` wrote: the base from its published files, the saved weights on top.

    Args:
        folder: the folder, with the processor in it.
        base: where the parts are, if not under the ids that `base.json` names; as in `save_trainable`.
        dtype: of the weights but the routers; None takes the saved model's.
        attn_implementation, quantization_config: as in transformers.
        **hub: `cache_dir`, `local_files_only`, as in transformers.

    Raises:
        OSError: if the base or the folder cannot be read.
        ValueError: if the base is not the one that the weights were saved for, by checksum; both are named.
    """
    folder = Path(folder).expanduser()
    if not is_trainable_folder(folder):
        raise OSError(
            f"{folder} has no {BASE_FILE}: save_trainable did not write it. Give a folder that it wrote."
        )
    config: Any = MoeLlavaConfig.from_pretrained(folder)
    if not (folder / WEIGHTS_FILE).is_file():
        raise OSError(
            f"{folder} is not complete: {WEIGHTS_FILE} is missing. Copy or save it again."
        )
    state = load_file(folder / WEIGHTS_FILE)
    dtype = dtype or config.dtype or torch.float32
    names = _weight_names(config)
    base_state = _read_base(config, base or {}, **hub)
    shared = {name: base_state[name] for name in base_state if name in names and name not in state}
    _require_same_base(folder, config, base or {}, shared)
    for name, tensor in shared.items():
        rows = state.pop(name + ADDED_ROWS, None)
        state[name] = (
            tensor.to(dtype) if rows is None else torch.cat([tensor.to(dtype), rows.to(dtype)])
        )

    options = {
        "attn_implementation": attn_implementation,
        "quantization_config": quantization_config,
    }
    options = {name: value for name, value in options.items() if value is not None}
    model = load_weights(None, str(folder), config=config, state_dict=state, dtype=dtype, **options)
    if (folder / "generation_config.json").is_file():
        model.generation_config = GenerationConfig.from_pretrained(folder)
    model.built_from = {key: str(path) for key, path in (base or {}).items()}
    loaded = LoadedModel(model, MoeLlavaProcessor.from_pretrained(folder))
    if (folder / ADAPTER_FOLDER).is_dir():
        from peft import PeftModel  # only those who saved an adapter need it

        adapted: Any = PeftModel.from_pretrained(model, str(folder / ADAPTER_FOLDER))
        loaded = LoadedModel(adapted, loaded.processor)
    loaded.model.eval()
    return loaded


def is_trainable_folder(path: str | os.PathLike[str]) -> bool:
    """Whether `save_trainable` wrote this folder."""
    return (Path(path).expanduser() / BASE_FILE).is_file()


def _difference(
    state: dict[str, Tensor], base: dict[str, Tensor], dtype: torch.dtype
) -> Iterator[tuple[str, Tensor]]:
    for name, tensor in state.items():
        tensor = tensor.detach().cpu()
        reference = base.get(name)
        num_rows = 0 if reference is None or reference.dim() == 0 else len(reference)
        is_grown = reference is not None and tensor.dim() == 2 and len(tensor) > num_rows
        if reference is None or not torch.equal(
            tensor[:num_rows] if is_grown else tensor, reference.to(dtype)
        ):
            yield name, tensor.contiguous()
        elif is_grown:
            yield name + ADDED_ROWS, tensor[num_rows:].contiguous()


def _checksums(shared: dict[str, Tensor]) -> tuple[str, str]:
    """SHA-256 over names, dtypes, shapes and bytes of the language model's and of the tower's tensors."""
    hashes = hashlib.sha256(), hashlib.sha256()
    for name in sorted(shared):
        tensor, digest = shared[name].detach().contiguous(), hashes[name.startswith(TOWER_PREFIX)]
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return hashes[0].hexdigest(), hashes[1].hexdigest()


def _require_same_base(
    folder: Path, config: MoeLlavaConfig, base: Mapping[str, Any], shared: dict[str, Tensor]
) -> None:
    recorded = json.loads((folder / BASE_FILE).read_text())
    for key, found in zip(PARTS, _checksums(shared), strict=True):
        part = PARTS[key]
        expected = recorded[part]
        if found != expected["sha256"]:
            given = base.get(key, expected["name"])
            origin = Origin(expected["name"], expected["revision"])
            raise ValueError(
                f"The weights in {folder} were saved for the {part} {origin} (sha256 {expected['sha256'][:12]}), but "
                f"{str(given)!r} holds other weights (sha256 {found[:12]}). Give the right one with "
                f"load_trainable(folder, base={{{key!r}: ...}})."
            )


def _origins(config: MoeLlavaConfig) -> dict[str, Origin]:
    vision = config.vision_config
    names = (config.language_model, config.language_model_revision), (vision.tower, vision.revision)
    for part, (name, _) in zip(PARTS.values(), names, strict=True):
        if name is None:
            raise ValueError(
                f"This model's config does not say which {part} it was built from, so there is no base to save the "
                "difference from. Use model.save_pretrained, or build with load_pretrained_model."
            )
    return {key: Origin(*name) for key, name in zip(PARTS, names, strict=True)}


def _read_base(config: MoeLlavaConfig, base: Mapping[str, Any], **hub: Any) -> dict[str, Tensor]:
    """The published weights under our names, in their own dtypes, mapped to their files where they can be."""
    for key in base:
        if key not in PARTS:
            raise unknown_name("part of a base", key, PARTS)
    origins = _origins(config)
    sources, options = {}, {}
    for key, origin in origins.items():
        sources[key] = str(base.get(key, origin.name))
        options[key] = hub | {"revision": origin.revision if sources[key] == origin.name else None}
    try:
        language_model, tower = sources.values()
        model_type = model_type_of(language_model, **options["model_name_or_path"])
        if model_type == "llava":
            return read_llava(
                language_model, moe_config=False, **options["model_name_or_path"]
            ).state_dict
        if model_type in LAYOUTS:
            state = imported_state_dict(language_model, **options["model_name_or_path"])[1]
        else:
            state = read_state_dict(language_model, **options["model_name_or_path"])
        encoder = create_encoder(
            _encoder_type(config),
            tower,
            image_size=config.vision_config.image_size,
            **options["mm_vision_tower"],
        )
    except OSError as error:
        raise OSError(
            f"The base cannot be read: language model {origins['model_name_or_path']}, vision tower "
            f"{origins['mm_vision_tower']}. Where they are local folders, say where: base={{'model_name_or_path': ..., "
            f"'mm_vision_tower': ...}}. {error}"
        ) from error
    state = {joined_name(name): value for name, value in state.items()}
    return state | {f"{TOWER_PREFIX}{name}": value for name, value in encoder.state_dict().items()}


def _encoder_type(config: MoeLlavaConfig) -> str | None:
    model_type = config.vision_config.model_type
    return next((kind.name for kind in encoder_kinds() if model_type in kind.model_types), None)


def _weight_names(config: MoeLlavaConfig) -> set[str]:
    with torch.device("meta"):
        model = MoeLlavaForConditionalGeneration(config)
    return set(model.state_dict()) - set(model.all_tied_weights_keys)


def _own_state_dict(model: MoeLlavaForConditionalGeneration) -> dict[str, Tensor]:
    """The model's weights under their own names: without an adapter's wrappers, and each tied weight once."""
    names = _weight_names(model.config)
    wrappers = (".base_layer.", ".original_module.")
    state = {}
    for name, tensor in model.state_dict().items():
        for wrapper in wrappers:
            name = name.replace(wrapper, ".")
        if name in names:
            state[name] = tensor
    missing = names - state.keys()
    if missing:
        raise ValueError(
            f"The model lacks weights that its config asks for: {first_names(sorted(missing))}. "
            "Merge or unload what has been put around it."
        )
    return state
