"""Saved models: `open_saved` opens one of ours, whole or a difference, or a LLaVA; `load_weights` is strict."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from moellava.encoders.weights import require_loaded
from moellava.model.configuration_moellava import MoeLlavaConfig
from moellava.model.from_llava import read_llava
from moellava.model.loaded_model import LoadedModel
from moellava.model.modeling_moellava import MoeLlavaForConditionalGeneration
from moellava.model.parts import load_generation_config, load_model_config
from moellava.model.processing_moellava import MoeLlavaProcessor


def open_saved(
    name: str,
    *,
    moe_config: Mapping[str, Any] | bool,
    seed: int,
    device_map: Any,
    build: Mapping[str, Any],
    hub: Mapping[str, Any],
) -> LoadedModel:
    """Open a folder or hub id that holds a model of ours, whole or by `save_trainable`, or a LLaVA of transformers.

    `build` and `hub` as in `moellava.model.assembly.assemble`; other arguments as in `load_pretrained_model`.
    """
    config = load_model_config(name, **hub)
    if config.model_type == "llava":
        parts = read_llava(name, moe_config=moe_config, dtype=build["dtype"], seed=seed, **hub)
        options = {**build, "dtype": parts.config.dtype, "device_map": device_map}
        model = load_weights(None, name, config=parts.config, state_dict=parts.state_dict, **options)
        model.generation_config = load_generation_config(name, parts.processor.tokenizer, **hub)
        model.built_from = {"model_name_or_path": name, "mm_vision_tower": name}
        return LoadedModel(model, parts.processor)
    if not isinstance(config, MoeLlavaConfig):
        raise ValueError(
            f"{name!r} is a {config.model_type!r} checkpoint, not a model that this library saved. To join it with an "
            f"image encoder, give {{'model_name_or_path': {name!r}, 'mm_vision_tower': ...}}."
        )
    if moe_config is not True:
        raise ValueError(
            f"{name!r} is a saved model, whose layers are fixed: leave out moe_config={moe_config!r}, or give a "
            "mapping to build a new model."
        )
    from moellava.model.saving import is_trainable_folder, load_trainable  # it builds on this module

    if is_trainable_folder(name):
        if device_map is not None:
            raise ValueError(
                f"device_map is for a whole model, but {name!r} holds a difference from its base. Leave it out."
            )
        return load_trainable(name, **build, **hub)
    path = str(Path(name).expanduser()) if Path(name).expanduser().is_dir() else name
    model = load_weights(path, name, device_map=device_map, **{**build, "dtype": build["dtype"] or "auto"}, **hub)
    return LoadedModel(model, MoeLlavaProcessor.from_pretrained(path, **hub))


def load_weights(path: str | None, name: str, **options: Any) -> MoeLlavaForConditionalGeneration:
    """`from_pretrained`, but strict: transformers only logs missing tensors, and leaves some of them uninitialised."""
    try:
        loaded: Any = MoeLlavaForConditionalGeneration.from_pretrained(path, output_loading_info=True, **options)
    except SafetensorError as error:  # it does not say which file
        broken = [file.name for file in sorted(Path(path or "").glob("*.safetensors")) if not _is_readable(file)]
        raise OSError(
            f"A weights file of {name!r} cannot be read; is it complete? {', '.join(broken)} ({error}). Copy or save "
            "it again."
        ) from error
    model, info = loaded
    require_loaded(name, info)
    return model


def _is_readable(file: Path) -> bool:
    try:
        with safe_open(file, framework="pt"):
            return True
    except SafetensorError:
        return False
