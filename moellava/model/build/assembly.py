"""Parts in, one model out: image encoder, projector and language model joined in a single state dict.

Public names: `assemble`, `configure`, `find_language_model`.
"""

import copy
import logging
from collections.abc import Callable, Mapping
from dataclasses import asdict
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import PreTrainedConfig

from moellava.encoders import VisionEncoder
from moellava.model.build.request import BuildRequest
from moellava.model.chat_templates import multimodal_chat_template
from moellava.model.checkpoint.strict import load_weights
from moellava.model.configuration_moellava import MoeLlavaConfig
from moellava.model.language_model import (
    LlamaMoeConfig,
    dense_state_dict,
    imported_state_dict,
    moe_config_from_dense,
    read_state_dict,
    upcycled_state_dict,
)
from moellava.model.language_model.mixtures import LAYOUTS
from moellava.model.language_model.upcycling import split_moe_options
from moellava.model.loaded_model import LoadedModel
from moellava.model.modeling_moellava import PROJECTOR_PREFIX, TOWER_PREFIX, joined_name
from moellava.storage.sources import HubOptions, origin_of
from moellava.model.build.parts import IMAGE_TOKEN, load_encoder, load_tokenizer
from moellava.model.checkpoint.configs import (
    as_dtype,
    load_generation_config,
    load_model_config,
    model_type_of,
)
from moellava.model.processing_moellava import MoeLlavaProcessor
from moellava.model.projector import build_projector, projector_options
from moellava.model.checkpoint.tower_identity import TowerIdentity, tower_identity
from moellava.model.checkpoint.projector_file import TrainedProjector, read_projector

logger = logging.getLogger(__name__)

DEFAULT_PROJECTOR = "mlp2x_gelu"


def assemble(
    request: BuildRequest,
    *,
    moe_config: Mapping[str, Any] | bool,
    seed: int,
    build: Mapping[str, Any],
    hub: Mapping[str, Any],
    fallback_to_default: bool = False,
) -> LoadedModel:
    """Build the model of a request.

    Args:
        build: `dtype` and, where given, `attn_implementation` and `quantization_config`, for `from_pretrained`.
        hub: `revision` (of the language model), `cache_dir`, `local_files_only`, `token`.

    Other arguments and errors: as `load_pretrained_model`.
    """
    parts = _find_parts(
        request,
        moe_config=moe_config,
        dtype=build["dtype"],
        seed=seed,
        hub=hub,
        fallback_to_default=fallback_to_default,
    )
    config, projector = parts.config, parts.projector
    name, dtype = request.model_name_or_path, parts.language_model.dtype
    if projector is not None:
        projector.require_fit(config.projector_shape, parts.tower)
    _log_projector(config, projector, parts.tower)
    state_dict = _join_state_dicts(parts.language_model.read(), parts.encoder, config)
    for key, tensor in _projector_weights(config, projector, seed).items():
        state_dict[f"{PROJECTOR_PREFIX}{key}"] = tensor
    model = load_weights(
        None, name, config=config, state_dict=state_dict, **{**build, "dtype": dtype}
    )
    model.generation_config = load_generation_config(name, parts.processor.tokenizer, **hub)
    # For save_trainable, which reads the base again; paths of this machine, so it is no part of the config.
    model.built_from = {"model_name_or_path": name, "mm_vision_tower": request.mm_vision_tower}
    return LoadedModel(model, parts.processor)


def configure(
    request: BuildRequest, *, moe_config: Mapping[str, Any] | bool, dtype: torch.dtype | None
) -> tuple[MoeLlavaConfig, MoeLlavaProcessor]:
    """Config and processor of the model that a request describes; of the weights, only the tower's are opened."""
    parts = _find_parts(
        request, moe_config=moe_config, dtype=dtype, seed=0, hub={}, fallback_to_default=False
    )
    return parts.config, parts.processor


class _Parts(NamedTuple):
    """All that a request names, found; of the weights, only the tower's are read."""

    config: MoeLlavaConfig
    processor: MoeLlavaProcessor
    language_model: "LanguageModel"
    encoder: VisionEncoder
    tower: TowerIdentity
    projector: TrainedProjector | None


def _find_parts(
    request: BuildRequest,
    *,
    moe_config: Mapping[str, Any] | bool,
    dtype: torch.dtype | None,
    seed: int,
    hub: Mapping[str, Any],
    fallback_to_default: bool,
) -> _Parts:
    name = request.model_name_or_path
    projector = None if request.projector_path is None else read_projector(request.projector_path)
    projector_type, options = _choose_projector(request, projector)
    language_model = find_language_model(
        name, moe_config=moe_config, dtype=dtype, seed=seed, hub=hub
    )
    tower_hub = {**hub, "revision": request.mm_vision_tower_revision}
    encoder = load_encoder(request, fallback_to_default=fallback_to_default, **tower_hub)
    tokenizer = load_tokenizer(name, **hub)
    text_config = language_model.config
    text_config.vocab_size = max(text_config.vocab_size, len(tokenizer))
    origin = origin_of(name, HubOptions(**hub))
    tower = tower_identity(encoder.config, encoder.state_dict())
    config = MoeLlavaConfig(
        vision_config=encoder.config,
        text_config=text_config,
        image_token_id=tokenizer.get_vocab()[IMAGE_TOKEN],
        projector_type=projector_type,
        projector_options=options,
        language_model=origin.name,
        language_model_revision=origin.revision,
        projector_tower=asdict(tower),
        dtype=language_model.dtype,
    )
    processor = MoeLlavaProcessor(
        encoder.image_processor,
        tokenizer,
        num_image_tokens=config.num_image_tokens,
        chat_template=multimodal_chat_template(tokenizer),
    )
    return _Parts(config, processor, language_model, encoder, tower, projector)


class LanguageModel(NamedTuple):
    """A language model that is found: `read()` gives its weights, under the names of its `ForCausalLM`."""

    config: PreTrainedConfig
    dtype: torch.dtype
    read: Callable[[], dict[str, Tensor]]


def find_language_model(
    name: str,
    *,
    moe_config: Mapping[str, Any] | bool,
    dtype: torch.dtype | None,
    seed: int,
    hub: Mapping[str, Any],
) -> LanguageModel:
    """A dense Llama as a mixture, or dense with `moe_config=False`; a mixture as it is."""
    model_type = model_type_of(name, **hub)
    if model_type == MoeLlavaConfig.model_type:
        raise ValueError(
            f"model_name_or_path {name!r} is a saved multimodal model, not a language model. "
            f"Open it with load_pretrained_model({name!r})."
        )
    is_mixture = model_type in LAYOUTS or model_type == LlamaMoeConfig.model_type
    if is_mixture and moe_config is not True:
        raise ValueError(
            f"model_name_or_path {name!r} is a mixture of experts already ({model_type!r}): there is no dense model to "
            f"which moe_config={moe_config!r} could apply. Leave moe_config out."
        )
    if model_type in LAYOUTS:
        mixture, state_dict = imported_state_dict(name, dtype=dtype, **hub)
        return LanguageModel(
            mixture, dtype or state_dict["model.embed_tokens.weight"].dtype, lambda: state_dict
        )
    config = load_model_config(name, **hub)
    dtype = dtype or as_dtype(config.dtype) or torch.float32
    if is_mixture or moe_config is False:
        read = read_state_dict if is_mixture else dense_state_dict
        return LanguageModel(config, dtype, partial(read, name, dtype=dtype, **hub))
    options, upcycling = split_moe_options(moe_config)
    mixture = moe_config_from_dense(config, **options)
    read = partial(
        upcycled_state_dict,
        name,
        copy.deepcopy(mixture),
        dtype=dtype,
        seed=seed,
        **upcycling,
        **hub,
    )
    return LanguageModel(mixture, dtype, read)


def _choose_projector(
    request: BuildRequest, trained: TrainedProjector | None
) -> tuple[str, dict[str, Any]]:
    """Type and options: those asked for, or the trained projector's own, which may not be contradicted."""
    if trained is None:
        projector_type = request.projector_type or DEFAULT_PROJECTOR
        return projector_type, projector_options(projector_type, request.projector_options)
    own = projector_options(trained.projector_type, trained.options)
    if request.projector_type not in (None, trained.projector_type):
        raise ValueError(
            f"projector_type is {request.projector_type!r}, but the projector {trained.path} is a "
            f"{trained.projector_type!r}. Leave projector_type out."
        )
    asked = projector_options(trained.projector_type, request.projector_options or own)
    if asked != own:
        raise ValueError(
            f"The options of the projector are {asked}, but {trained.path} has {own}. Leave projector_options out."
        )
    return trained.projector_type, own


def _projector_weights(
    config: MoeLlavaConfig, trained: TrainedProjector | None, seed: int
) -> dict[str, Tensor]:
    if trained is not None:
        return trained.state_dict
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        projector = build_projector(
            config.projector_type, config.projector_shape, config.projector_options
        )
    return projector.state_dict()


def _log_projector(
    config: MoeLlavaConfig, trained: TrainedProjector | None, tower: TowerIdentity
) -> None:
    if trained is None:
        source = f"fresh, to be trained for {tower}"
    else:
        source = f"loaded from {trained.path}, trained for {trained.tower or 'a tower that it does not name'}"
    logger.info(
        "projector %s: %d image tokens per image, %s",
        config.projector_type,
        config.num_image_tokens,
        source,
    )


def _join_state_dicts(
    language_model: dict[str, Tensor], encoder: VisionEncoder, config: MoeLlavaConfig
) -> dict[str, Tensor]:
    """Language model and tower in one state dict; tensors are moved, not copied: memory peaks at the final size."""
    joined: dict[str, Tensor] = {}
    for key in list(language_model):
        tensor = language_model.pop(key)
        if key in ("model.embed_tokens.weight", "lm_head.weight"):
            tensor = _with_rows(tensor, config.text_config.vocab_size)
        joined[joined_name(key)] = tensor
    for key, tensor in encoder.state_dict().items():
        joined[f"{TOWER_PREFIX}{key}"] = tensor
    return joined


def _with_rows(weight: Tensor, num_rows: int) -> Tensor:
    """(V, D) → (num_rows, D): added tokens start as the mean of the others, like a word nothing is known of."""
    if num_rows == len(weight):
        return weight
    mean = weight.float().mean(0, keepdim=True).to(weight.dtype)
    return torch.cat([weight, mean.expand(num_rows - len(weight), -1)])
