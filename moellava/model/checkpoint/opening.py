"""Saved models: `open_saved` opens one of ours, whole or a difference, or a LLaVA."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from moellava.model.checkpoint.configs import load_generation_config, load_model_config
from moellava.model.checkpoint.difference import is_trainable_folder, load_trainable
from moellava.model.checkpoint.llava import read_llava
from moellava.model.checkpoint.strict import load_weights
from moellava.model.configuration_moellava import MoeLlavaConfig
from moellava.model.loaded_model import LoadedModel
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

    `build` and `hub` as in `moellava.model.build.assembly.assemble`; other arguments as in `load_pretrained_model`.
    """
    config = load_model_config(name, **hub)
    if config.model_type == "llava":
        parts = read_llava(name, moe_config=moe_config, dtype=build["dtype"], seed=seed, **hub)
        options = {**build, "dtype": parts.config.dtype, "device_map": device_map}
        model = load_weights(
            None, name, config=parts.config, state_dict=parts.state_dict, **options
        )
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
    if is_trainable_folder(name):
        if device_map is not None:
            raise ValueError(
                f"device_map is for a whole model, but {name!r} holds a difference from its base. Leave it out."
            )
        return load_trainable(name, **build, **hub)
    path = str(Path(name).expanduser()) if Path(name).expanduser().is_dir() else name
    model = load_weights(
        path, name, device_map=device_map, **{**build, "dtype": build["dtype"] or "auto"}, **hub
    )
    return LoadedModel(model, MoeLlavaProcessor.from_pretrained(path, **hub))
