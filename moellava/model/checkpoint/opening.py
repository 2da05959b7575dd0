"""Saved models: `open_saved` opens one of ours, whole or a difference, or a LLaVA."""

from pathlib import Path

from moellava.model.checkpoint.configs import (
    load_generation_config,
    load_model_config,
    open_processor,
)
from moellava.model.checkpoint.difference import is_trainable_folder, open_trainable
from moellava.model.checkpoint.llava import MODEL_TYPES as LLAVA_TYPES
from moellava.model.checkpoint.llava import read_llava
from moellava.model.checkpoint.strict import model_from_tensors, read_model
from moellava.model.configuration_moellava import MoeLlavaConfig
from moellava.model.load_options import LoadOptions
from moellava.model.loaded_model import LoadedModel
from moellava.storage.sources import HubOptions


def open_saved(name: str, options: LoadOptions, hub: HubOptions) -> LoadedModel:
    """Open a model of ours, whole or by `save_trainable`, or a LLaVA of transformers.

    Args:
        name: its folder or hub id.

    Raises:
        OSError: if there is no such model, or a file of it cannot be read.
        ValueError: if it is another kind of model, or an option does not apply to it.
    """
    config = load_model_config(name, **hub.keywords)
    if config.model_type in LLAVA_TYPES:
        return _open_llava(name, options, hub)
    if not isinstance(config, MoeLlavaConfig):
        raise ValueError(
            f"{name!r} is a {config.model_type!r} checkpoint, not a model that this library saved. "
            "To join it with an image encoder, give "
            f"{{'model_name_or_path': {name!r}, 'mm_vision_tower': ...}}."
        )
    if options.moe_config is not True:
        raise ValueError(
            f"{name!r} is a saved model, whose layers are fixed: leave out "
            f"moe_config={options.moe_config!r}, or give a mapping to build a new model."
        )
    if options.quantization_config is not None and hasattr(config, "quantization_config"):
        raise ValueError(
            f"{name!r} is quantised already, {config.quantization_config}. Leave load_in_8bit and "
            "load_in_4bit out, or open the model that it was made of."
        )
    if is_trainable_folder(name):
        if options.device_map is not None:
            raise ValueError(
                f"device_map is for a whole model, but {name!r} holds a difference from its base. "
                "Leave it out."
            )
        return open_trainable(Path(name), {}, options, hub)
    place = str(Path(name).expanduser()) if Path(name).expanduser().is_dir() else name
    model = read_model(place, name, config, options, hub)
    return LoadedModel(model, open_processor(place, hub))


def _open_llava(name: str, options: LoadOptions, hub: HubOptions) -> LoadedModel:
    parts = read_llava(
        name,
        moe_config=options.moe_config,
        dtype=options.dtype,
        seed=options.seed,
        **hub.keywords,
    )
    return model_from_tensors(
        parts.state_dict,
        parts.config,
        parts.processor,
        name=name,
        dtype=parts.dtype,
        options=options,
        generation_config=load_generation_config(name, parts.processor.tokenizer, **hub.keywords),
        built_from={"model_name_or_path": name, "mm_vision_tower": name},
    )
