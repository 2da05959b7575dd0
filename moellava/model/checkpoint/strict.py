"""Weights that fit exactly → a model: `read_model` from files, `model_from_tensors` from memory."""

import copy
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor
from transformers import GenerationConfig

from moellava.messages import first_names
from moellava.model.checkpoint.configs import GENERATION_FILE, read_generation_config, savable
from moellava.model.configuration_moellava import MoeLlavaConfig
from moellava.model.load_options import LoadOptions
from moellava.model.loaded_model import LoadedModel
from moellava.model.modeling_moellava import MoeLlavaForConditionalGeneration
from moellava.model.processing_moellava import MoeLlavaProcessor
from moellava.storage.errors import reading
from moellava.storage.sources import HubOptions, find_file, parse_source
from moellava.storage.weights import (
    nonfinite_names,
    require_covered,
    require_loaded,
    require_own_files,
)


def read_model(
    place: str, name: str, config: MoeLlavaConfig, options: LoadOptions, hub: HubOptions
) -> MoeLlavaForConditionalGeneration:
    """The model that `save_pretrained` wrote, without a tensor too many or too few.

    Args:
        place: its folder or hub id.
        name: what the user called it, for messages.
        config: its own.
    """
    source = parse_source(place, hub)
    require_own_files(source)
    with reading(place, "a model"):
        require_covered(source, _num_values(config))
    # transformers passes over a file that it cannot read.
    generation_file = find_file(source, GENERATION_FILE, download=True, required=False)
    generation_config = generation_file and read_generation_config(generation_file)
    keywords = {**options.keywords, **hub.keywords, "dtype": options.dtype or "auto"}
    model = _from_pretrained(place, name, **keywords)
    if generation_config:
        model.generation_config = generation_config
    elif model.generation_config is not None:
        savable(model.generation_config)
    return model


def _num_values(config: MoeLlavaConfig) -> int:
    with torch.device("meta"):
        return MoeLlavaForConditionalGeneration(copy.deepcopy(config)).num_parameters()


def model_from_tensors(
    state_dict: Mapping[str, Tensor],
    config: MoeLlavaConfig,
    processor: MoeLlavaProcessor,
    *,
    name: str,
    dtype: torch.dtype,
    options: LoadOptions | None = None,
    generation_config: GenerationConfig | None = None,
    built_from: Mapping[str, str] | None = None,
) -> LoadedModel:
    """A model around its weights, in evaluation mode.

    Args:
        state_dict: under the names of `MoeLlavaForConditionalGeneration`.
        name: what the weights are called in messages.
        dtype: of all weights but the routers.
        generation_config: None keeps what transformers makes of the config.
        built_from: where the parts lie, for `save_trainable`, which reads the base again. These
            are paths of this machine, so they are not part of the config.
    """
    keywords = (options or LoadOptions()).keywords
    model = _from_pretrained(
        None, name, config=config, state_dict=state_dict, dtype=dtype, **keywords
    )
    if generation_config is not None:
        model.generation_config = generation_config
    model.built_from = None if built_from is None else dict(built_from)
    model.eval()  # type: ignore[no-untyped-call]
    return LoadedModel(model, processor)


def _from_pretrained(
    place: str | None, name: str, **keywords: object
) -> MoeLlavaForConditionalGeneration:
    """transformers only logs a missing tensor, and leaves some of them uninitialised."""
    with reading(place or name, "a model"):
        try:
            loaded: Any = MoeLlavaForConditionalGeneration.from_pretrained(
                place,
                output_loading_info=True,
                ignore_mismatched_sizes=True,  # they are in the loading info
                trust_remote_code=False,
                **keywords,
            )
        except SafetensorError as error:  # it does not say which file
            for file in sorted(Path(place or "").glob("*.safetensors")):
                with reading(file, "safetensors"), safe_open(file, framework="pt"):
                    pass
            raise error
    model: MoeLlavaForConditionalGeneration
    model, info = loaded
    require_loaded(name, info)
    if spoilt := nonfinite_names({**dict(model.named_parameters()), **dict(model.named_buffers())}):
        raise ValueError(
            f"The weights of {name} hold NaN or infinite values: {first_names(spoilt)}. The "
            "training diverged, or a file is damaged: use an earlier checkpoint."
        )
    return model
