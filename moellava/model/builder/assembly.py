"""Parts in, one model out: image encoder, projector and language model in a single state dict."""

import copy
import logging
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, replace
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor
from transformers import PreTrainedConfig

from moellava.encoders import VisionEncoder
from moellava.model.builder.parts import IMAGE_TOKEN, load_encoder, load_tokenizer
from moellava.model.builder.request import BuildRequest
from moellava.model.chat_templates import multimodal_chat_template
from moellava.model.checkpoint.configs import (
    load_generation_config,
    load_model_config,
    model_type_of,
)
from moellava.model.checkpoint.projector_file import TrainedProjector, read_projector
from moellava.model.checkpoint.strict import model_from_tensors
from moellava.model.checkpoint.tower_identity import TowerIdentity, tower_identity
from moellava.model.configuration_moellava import MoeLlavaConfig
from moellava.model.language_model import LlamaMoeConfig, moe_config_from_dense
from moellava.model.language_model.checkpoint import CheckpointReader, dense_tensors, read_tensors
from moellava.model.language_model.mixtures import LAYOUTS, imported_tensors
from moellava.model.language_model.upcycling import (
    Upcycling,
    split_moe_options,
    upcycled_source,
)
from moellava.model.load_options import LoadOptions
from moellava.model.loaded_model import LoadedModel
from moellava.model.modeling_moellava import (
    PROJECTOR_PREFIX,
    TOWER_PREFIX,
    MoeLlavaForConditionalGeneration,
    joined_name,
)
from moellava.model.processing_moellava import MoeLlavaProcessor
from moellava.model.projector import build_projector, num_projected_tokens, projector_options
from moellava.model.quantization import MoellavaQuantizationConfig, quantized_tensors
from moellava.model.tiling import Tiling
from moellava.storage.sources import HubOptions, origin_of
from moellava.storage.weights import as_dtype

logger = logging.getLogger(__name__)

DEFAULT_PROJECTOR = "mlp2x_gelu"


def assemble(
    request: BuildRequest,
    options: LoadOptions,
    hub: HubOptions,
    *,
    fallback_to_default: bool = False,
) -> LoadedModel:
    """Build the model of a request.

    Args:
        hub: its revision is the language model's.
        fallback_to_default: as in `load_pretrained_model`, whose errors are raised.
    """
    parts = _find_parts(request, options, hub, fallback_to_default=fallback_to_default)
    config, projector, name = parts.config, parts.projector, request.model_name_or_path
    if projector is not None:
        projector.require_fit(config.projector_shape, parts.tower)
    _log_projector(config, projector, parts.tower)
    tensors = _joined(parts.language_model.read(), parts.encoder, config)
    quantization = copy.deepcopy(options.quantization_config)
    if isinstance(quantization, MoellavaQuantizationConfig):
        with torch.device("meta"):
            quantization.fit(MoeLlavaForConditionalGeneration(copy.deepcopy(config)))
        tensors = quantized_tensors(tensors, quantization)
        config.quantization_config = quantization.to_dict()
        options = replace(options, quantization_config=None)
    state_dict = dict(tensors)
    for key, tensor in _projector_weights(config, projector, options.seed).items():
        state_dict[f"{PROJECTOR_PREFIX}{key}"] = tensor
    tokenizer = parts.processor.tokenizer
    return model_from_tensors(
        state_dict,
        config,
        parts.processor,
        name=name,
        dtype=parts.language_model.dtype,
        options=options,
        generation_config=load_generation_config(name, tokenizer, **hub.keywords),
        built_from={"model_name_or_path": name, "mm_vision_tower": request.mm_vision_tower},
    )


def configure(
    request: BuildRequest, options: LoadOptions
) -> tuple[MoeLlavaConfig, MoeLlavaProcessor]:
    """Config and processor of a request's model; of the weights, only the tower's are opened."""
    parts = _find_parts(request, options, HubOptions(), fallback_to_default=False)
    return parts.config, parts.processor


class LanguageModel(NamedTuple):
    """A language model that is found.

    `read()` gives its weights one by one, under the names of its `ForCausalLM`.
    """

    config: PreTrainedConfig
    dtype: torch.dtype
    read: Callable[[], Iterator[tuple[str, Tensor]]]


class _Parts(NamedTuple):
    """All that a request names, found; of the weights, only the tower's are read."""

    config: MoeLlavaConfig
    processor: MoeLlavaProcessor
    language_model: LanguageModel
    encoder: VisionEncoder
    tower: TowerIdentity
    projector: TrainedProjector | None


def _find_parts(
    request: BuildRequest, options: LoadOptions, hub: HubOptions, *, fallback_to_default: bool
) -> _Parts:
    name = request.model_name_or_path
    projector = None if request.projector_path is None else read_projector(request.projector_path)
    projector_type, chosen = _choose_projector(request, projector)
    language_model = find_language_model(name, options, hub)
    encoder = load_encoder(
        request,
        hub.at(request.mm_vision_tower_revision),
        fallback_to_default=fallback_to_default,
    )
    tokenizer = load_tokenizer(name, **hub.keywords)
    text_config = language_model.config
    text_config.vocab_size = max(text_config.vocab_size, len(tokenizer))
    origin = origin_of(name, hub)
    tiling = None if request.tiling is None else asdict(request.tiling)
    tower = tower_identity(encoder.config, encoder.state_dict())
    config = MoeLlavaConfig(
        vision_config=encoder.config,
        text_config=text_config,
        image_token_id=tokenizer.get_vocab()[IMAGE_TOKEN],
        projector_type=projector_type,
        projector_options=chosen,
        tiling=tiling,
        language_model=origin.name,
        language_model_revision=origin.revision,
        projector_tower=asdict(tower),
        dtype=language_model.dtype,
    )
    if request.tiling is not None:
        _require_merge(config)
        _require_context(config, request.tiling)
    processor = MoeLlavaProcessor(
        encoder.image_processor,
        tokenizer,
        num_image_tokens=config.num_image_tokens,
        chat_template=multimodal_chat_template(tokenizer),
        tiling=tiling,
    )
    return _Parts(config, processor, language_model, encoder, tower, projector)


def _require_merge(config: MoeLlavaConfig) -> None:
    """Raise `ValueError` if the projector cannot merge the views of an image as tiling asks."""
    merge = (config.tiling or {}).get("merge", "flat")
    if merge == "spatial_unpad":
        raise ValueError(
            "tiling has merge='spatial_unpad', whose row ends are learned: it comes with a "
            "checkpoint of LLaVA-NeXT. Take 'flat' or 'joint'."
        )
    if merge == "flat":
        return
    shape, given = config.projector_shape, (config.projector_type, config.projector_options)
    rows, columns = shape.grid
    wider = replace(shape, num_patches=2 * shape.num_patches, grid=(2 * rows, columns))
    one, two = (num_projected_tokens(given[0], own, given[1]) for own in (shape, wider))
    if one != two:
        raise ValueError(
            f"tiling has merge='joint', but the projector {config.projector_type!r} makes "
            f"{one} tokens of {shape.num_patches} patches and {two} of {wider.num_patches}. Take a "
            "projector with a fixed number of tokens, such as 'perceiver' or 'qformer', or "
            "merge='flat'."
        )


def _require_context(config: MoeLlavaConfig, tiling: Tiling) -> None:
    """Raise `ValueError` if an image with all its tiles is longer than the context."""
    context_len = getattr(config.text_config, "max_position_embeddings", None)
    most = tiling.max_tiles + tiling.overview if tiling.merge == "flat" else 1
    num_tokens = most * config.num_image_tokens
    if context_len is not None and num_tokens >= context_len:
        raise ValueError(
            f"tiling makes up to {most} views of an image, {config.num_image_tokens} tokens each: "
            f"{num_tokens} tokens, but the context holds {context_len}. Lower max_tiles, or take a "
            "projector with fewer tokens, such as 'pixel_shuffle'."
        )


def find_language_model(name: str, options: LoadOptions, hub: HubOptions) -> LanguageModel:
    """A dense Llama as a mixture, or dense with `moe_config=False`; a mixture as it is."""
    moe_config, dtype = options.moe_config, options.dtype
    model_type = model_type_of(name, **hub.keywords)
    if model_type == MoeLlavaConfig.model_type:
        raise ValueError(
            f"model_name_or_path {name!r} is a saved multimodal model, not a language model. "
            f"Open it with load_pretrained_model({name!r})."
        )
    is_mixture = model_type in LAYOUTS or model_type == LlamaMoeConfig.model_type
    if is_mixture and moe_config is not True:
        raise ValueError(
            f"model_name_or_path {name!r} is already a mixture of experts ({model_type!r}): there "
            f"is no dense model for moe_config={moe_config!r}. Leave moe_config out."
        )
    if model_type in LAYOUTS:
        dtype = dtype or CheckpointReader(name, hub).dtype()
        mixture, weights = imported_tensors(name, dtype=dtype, **hub.keywords)
        return LanguageModel(mixture, dtype, lambda: weights)
    config = load_model_config(name, **hub.keywords)
    dtype = dtype or as_dtype(config.dtype) or torch.float32
    if is_mixture or moe_config is False:
        read = read_tensors if is_mixture else dense_tensors
        return LanguageModel(config, dtype, partial(read, name, dtype=dtype, **hub.keywords))
    fields, upcycling = split_moe_options(moe_config)
    mixture = moe_config_from_dense(config, **fields)
    read_upcycled = partial(
        upcycled_source,
        name,
        copy.deepcopy(mixture),
        Upcycling(seed=options.seed, **upcycling),
        dtype=dtype,
        **hub.keywords,
    )
    return LanguageModel(mixture, dtype, read_upcycled)


def _choose_projector(
    request: BuildRequest, trained: TrainedProjector | None
) -> tuple[str, dict[str, object]]:
    """Type and options: those asked for, or the trained projector's, which may not differ."""
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
            f"The options of the projector are {asked}, but {trained.path} has {own}. Leave "
            "projector_options out."
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
        trained_for = trained.tower or "a tower that it does not name"
        source = f"loaded from {trained.path}, trained for {trained_for}"
    logger.info(
        "projector %s: %d image tokens per view of an image, %s",
        config.projector_type,
        config.num_image_tokens,
        source,
    )


def _joined(
    language_model: Iterable[tuple[str, Tensor]], encoder: VisionEncoder, config: MoeLlavaConfig
) -> Iterator[tuple[str, Tensor]]:
    """Language model and tower, one tensor at a time, so that memory peaks at the final size."""
    for key, tensor in language_model:
        if key in ("model.embed_tokens.weight", "lm_head.weight"):
            tensor = _with_rows(tensor, config.text_config.vocab_size)
        yield joined_name(key), tensor
    for key, tensor in encoder.state_dict().items():
        yield f"{TOWER_PREFIX}{key}", tensor


def _with_rows(weight: Tensor, num_rows: int) -> Tensor:
    """(V, D) → (num_rows, D): added tokens start as the mean of the others."""
    if num_rows == len(weight):
        return weight
    mean = weight.float().mean(0, keepdim=True).to(weight.dtype)
    return torch.cat([weight, mean.expand(num_rows - len(weight), -1)])
