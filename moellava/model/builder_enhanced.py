"""The front door: `load_pretrained_model` joins an image encoder and a language model, or opens a saved model."""

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import (
    AddedToken,
    AutoConfig,
    AutoTokenizer,
    GenerationConfig,
    PreTrainedConfig,
    PreTrainedTokenizerBase,
)

from moellava.encoders import VisionEncoder, create_encoder
from moellava.model.build_request import (
    BuildRequest,
    CustomVisionConfig,
    is_description_file,
    read_build_request,
)
from moellava.model.chat_templates import multimodal_chat_template
from moellava.model.configuration_moellava import MoeLlavaConfig
from moellava.model.describe import count_active_parameters, describe
from moellava.model.from_llava import read_llava
from moellava.model.language_model import dense_state_dict, moe_config_from_dense, upcycled_state_dict
from moellava.model.loaded_model import LoadedModel
from moellava.model.modeling_moellava import MoeLlavaForConditionalGeneration
from moellava.model.origin import origin_of
from moellava.model.processing_moellava import MoeLlavaProcessor
from moellava.model.projector import build_projector, projector_options

__all__ = [
    "CustomVisionConfig",
    "LoadedModel",
    "build_projector",
    "describe",
    "load_model_config",
    "load_pretrained_model",
    "load_tokenizer",
    "load_vision_encoder",
]

logger = logging.getLogger(__name__)

IMAGE_TOKEN = "<image>"


def load_pretrained_model(
    model: Any,
    *,
    encoder_type: str | None = None,
    custom_vision_config: Any = None,
    moe_config: Mapping[str, Any] | bool = True,
    device: str | torch.device | None = None,
    device_map: Any = None,
    dtype: torch.dtype | str | None = None,
    attn_implementation: str | None = None,
    revision: str | None = None,
    cache_dir: str | Path | None = None,
    local_files_only: bool = False,
    token: str | bool | None = None,
    fallback_to_default: bool = False,
    seed: int = 0,
) -> LoadedModel:
    """Build a multimodal model from its parts, or open a saved one.

    Args:
        model: what to load. A mapping, dataclass or object, or a YAML or JSON file, with the keys of
            `moellava.model.build_request.BuildRequest`: `model_name_or_path` (language model),
            `mm_vision_tower` and, if wanted, `mm_hidden_size`, `encoder_type`, `projector_type`, ...; or the
            folder or hub id of a model that this library saved, or of a transformers LLaVA (CLIP and Llama).
        encoder_type: `biomedclip`, `clip`, ...; None detects it from the tower's name.
        custom_vision_config: `CustomVisionConfig` or anything with its fields.
        moe_config: True makes the language model a sparse mixture of experts by default rules, a mapping sets
            fields of `LlamaMoeConfig` (`num_experts`, `moe_layers`, ...), False keeps it dense.
        device: where the model goes; None leaves it on the CPU.
        device_map: spread a saved model over devices, as in transformers; in place of `device`.
        dtype: of all weights but the routers, such as `torch.bfloat16` or "bfloat16"; None takes the language
            model's own, as stored.
        attn_implementation: `sdpa`, `eager`, `flash_attention_2`, ...; None lets transformers choose.
        revision: commit, tag or branch on the hub of a saved model, or of the language model; the tower's is the
            key `mm_vision_tower_revision`.
        cache_dir, local_files_only, token: as in transformers.
        fallback_to_default: where a BiomedCLIP tower cannot be loaded, take the default BiomedCLIP, with a
            warning; the config records which tower was really loaded.
        seed: of the weights that no file holds: the projector and the routers.

    Returns:
        `(model, image_processor, tokenizer, context_len)`, a named tuple with `processor` and `answer` besides.
        The model is in evaluation mode.

    Raises:
        ValueError: settings that are unknown, missing, contradictory or do not fit the parts.
        OSError: parts that cannot be found or read.
    """
    if device is not None and device_map is not None:
        raise ValueError(f"device is {device!r} and device_map is {device_map!r}; give one of them.")
    hub: dict[str, Any] = {"revision": revision, "cache_dir": cache_dir, "local_files_only": local_files_only}
    hub |= {} if token is None else {"token": token}
    build: dict[str, Any] = {"dtype": _as_dtype(dtype)}
    build |= {} if attn_implementation is None else {"attn_implementation": attn_implementation}
    if isinstance(model, str | Path) and not is_description_file(model):
        if encoder_type is not None or custom_vision_config is not None:
            raise ValueError(
                f"{str(model)!r} is a saved model, whose parts are fixed: leave out encoder_type and "
                "custom_vision_config, or give a mapping to build a new model."
            )
        loaded = _open_saved(str(model), moe_config, seed, device_map=device_map, **build, **hub)
    else:
        if device_map is not None:
            raise ValueError("device_map is for a saved model: build, save_pretrained, and open the folder with it.")
        request = read_build_request(model, encoder_type=encoder_type, custom_vision_config=custom_vision_config)
        tower = {"fallback_to_default": fallback_to_default}
        loaded = _build(request, tower, moe_config=moe_config, seed=seed, build=build, hub=hub)
    _log_summary(loaded.model)
    if device is not None:
        loaded.model.to(device)  # type: ignore[arg-type]  # transformers' decorator hides the signature of `to`
    loaded.model.eval()
    return loaded


def load_vision_encoder(
    config: Any, encoder_type: str | None = None, custom_vision_config: Any = None, **options: Any
) -> tuple[VisionEncoder, Any]:
    """Load the image encoder that a model description names, and its image processor.

    Args:
        config: the mapping, dataclass or object that `load_pretrained_model` takes; or just the tower's id or folder.
        encoder_type, custom_vision_config: as in `load_pretrained_model`.
        **options: passed to `create_encoder` (`device`, `dtype`, `revision`, `cache_dir`, ...).

    Returns:
        `(encoder, image_processor)`.
    """
    if isinstance(config, str | Path):
        config = {"mm_vision_tower": str(config)}
    request = read_build_request(
        config,
        encoder_type=encoder_type,
        custom_vision_config=custom_vision_config,
        required=("mm_vision_tower",),
    )
    encoder = _load_encoder(request, **options)
    return encoder, encoder.image_processor


def load_tokenizer(model_name_or_path: str | Path, **hub: Any) -> PreTrainedTokenizerBase:
    """Load a language model's tokenizer, give it a token `<image>` and, where it has none, a padding token.

    Args:
        model_name_or_path: hub id or folder of the language model.
        **hub: `revision`, `cache_dir`, `local_files_only`, as in transformers.
    """
    try:
        tokenizer = AutoTokenizer.from_pretrained(model_name_or_path, **hub)
    except (OSError, ValueError) as error:
        raise OSError(f"No tokenizer can be read at {str(model_name_or_path)!r}: {error}") from error
    if IMAGE_TOKEN not in tokenizer.get_vocab():
        tokenizer.add_tokens([AddedToken(IMAGE_TOKEN, special=True, normalized=False)], special_tokens=True)
    if tokenizer.pad_token is None:
        # Padding is found by the attention mask, never by this id, so that sharing it with </s> does no harm.
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def load_model_config(model_name_or_path: str | Path, **hub: Any) -> PreTrainedConfig:
    """Load the config of a language model or of a saved multimodal model, with an error that helps.

    Raises:
        OSError: if there is no `config.json` at that id or folder, or it is none that transformers knows.
    """
    name = str(model_name_or_path)
    folder = Path(name).expanduser()
    if folder.is_dir() and not (folder / "config.json").is_file():
        found = sorted(path.name for path in folder.iterdir())[:8]
        raise OSError(
            f"The folder {name!r} is no checkpoint: it has no config.json (found: {', '.join(found) or 'nothing'}). "
            "Give the folder that save_pretrained wrote."
        )
    try:
        return AutoConfig.from_pretrained(folder if folder.is_dir() else name, **hub)
    except (OSError, ValueError) as error:
        raise OSError(
            f"No model {name!r} is found, neither as a folder nor on the hub or in its cache. "
            f"Check the spelling, or fetch it where there is a network: hf download {name}\n{error}"
        ) from error


def _build(
    request: BuildRequest,
    tower: dict[str, Any],
    *,
    moe_config: Mapping[str, Any] | bool,
    seed: int,
    build: dict[str, Any],
    hub: dict[str, Any],
) -> LoadedModel:
    dense_config = load_model_config(request.model_name_or_path, **hub)
    if isinstance(dense_config, MoeLlavaConfig):
        raise ValueError(
            f"model_name_or_path {request.model_name_or_path!r} is a saved multimodal model, not a language model. "
            f"Open it with load_pretrained_model({request.model_name_or_path!r})."
        )
    dtype = build["dtype"] or _as_dtype(dense_config.dtype) or torch.float32
    encoder = _load_encoder(request, **tower, **(hub | {"revision": request.mm_vision_tower_revision}))
    tokenizer = load_tokenizer(request.model_name_or_path, **hub)

    if moe_config is False:
        text_config = dense_config
        state_dict = dense_state_dict(request.model_name_or_path, dtype=dtype, **hub)
    else:
        text_config = moe_config_from_dense(dense_config, **({} if moe_config is True else moe_config))
        state_dict = upcycled_state_dict(request.model_name_or_path, text_config, dtype=dtype, seed=seed, **hub)
    text_config.vocab_size = max(text_config.vocab_size, len(tokenizer))
    origin = origin_of(request.model_name_or_path, **hub)
    config = MoeLlavaConfig(
        vision_config=encoder.config,
        text_config=text_config,
        image_token_id=tokenizer.get_vocab()[IMAGE_TOKEN],
        projector_type=request.projector_type,
        projector_options=projector_options(request.projector_type, request.projector_options),
        language_model=origin.name,
        language_model_revision=origin.revision,
        dtype=dtype,
    )
    state_dict = _join_state_dicts(state_dict, encoder, config, seed)
    options = build | {"dtype": dtype}
    model = _load_weights(None, request.model_name_or_path, config=config, state_dict=state_dict, **options)
    model.generation_config = _load_generation_config(request.model_name_or_path, tokenizer, **hub)
    processor = MoeLlavaProcessor(
        encoder.image_processor,
        tokenizer,
        num_image_tokens=config.num_image_tokens,
        chat_template=multimodal_chat_template(tokenizer),
    )
    return LoadedModel(model, processor)


def _as_dtype(dtype: torch.dtype | str | None) -> torch.dtype | None:
    found = getattr(torch, dtype, None) if isinstance(dtype, str) and dtype != "auto" else dtype
    if found in (None, "auto") and dtype in (None, "auto"):
        return None
    if not isinstance(found, torch.dtype) or not found.is_floating_point:
        raise ValueError(f"dtype is {dtype!r}; give torch.float32, torch.bfloat16 or torch.float16, or their names.")
    return found


def _load_encoder(request: BuildRequest, **options: Any) -> VisionEncoder:
    encoder = create_encoder(
        request.encoder_type,
        request.mm_vision_tower,
        image_size=request.image_size,
        select_layer=request.vision_feature_layer,
        select_feature=request.vision_feature_select_strategy,
        **options,
    )
    if request.mm_hidden_size not in (None, encoder.hidden_size):
        raise ValueError(
            f"mm_hidden_size is {request.mm_hidden_size}, but {request.mm_vision_tower} gives patch tokens of width "
            f"{encoder.hidden_size}. Set mm_hidden_size={encoder.hidden_size}, or leave it out."
        )
    return encoder


def _join_state_dicts(
    language_model: dict[str, Tensor], encoder: VisionEncoder, config: MoeLlavaConfig, seed: int
) -> dict[str, Tensor]:
    """One state dict of the whole model; tensors are moved, not copied, so that memory peaks at the final size."""
    joined: dict[str, Tensor] = {}
    for key in list(language_model):
        tensor = language_model.pop(key)
        if key in ("model.embed_tokens.weight", "lm_head.weight"):
            tensor = _with_rows(tensor, config.text_config.vocab_size)
        joined[f"model.language_{key}" if key.startswith("model.") else key] = tensor
    for key, tensor in encoder.state_dict().items():
        joined[f"model.vision_tower.{key}"] = tensor
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        projector = build_projector(config.projector_type, config.projector_shape, config.projector_options)
    for key, tensor in projector.state_dict().items():
        joined[f"model.multi_modal_projector.{key}"] = tensor
    return joined


def _with_rows(weight: Tensor, num_rows: int) -> Tensor:
    """(V, D) → (num_rows, D): added tokens start as the mean of the others, like a word nothing is known of."""
    if num_rows == len(weight):
        return weight
    mean = weight.float().mean(0, keepdim=True).to(weight.dtype)
    return torch.cat([weight, mean.expand(num_rows - len(weight), -1)])


def _open_saved(
    name: str,
    moe_config: Mapping[str, Any] | bool,
    seed: int,
    *,
    dtype: torch.dtype | None,
    device_map: Any,
    attn_implementation: str | None = None,
    **hub: Any,
) -> LoadedModel:
    config = load_model_config(name, **hub)
    if config.model_type == "llava":
        parts = read_llava(name, moe_config=moe_config, dtype=dtype, seed=seed, **hub)
        options = {"dtype": parts.config.dtype, "device_map": device_map, "attn_implementation": attn_implementation}
        model = _load_weights(None, name, config=parts.config, state_dict=parts.state_dict, **options)
        model.generation_config = _load_generation_config(name, parts.processor.tokenizer, **hub)
        return LoadedModel(model, parts.processor)
    if not isinstance(config, MoeLlavaConfig):
        raise ValueError(
            f"{name!r} is a {config.model_type!r} checkpoint, not a model that this library saved. To join it with an "
            f"image encoder, give {{'model_name_or_path': {name!r}, 'mm_vision_tower': ...}}."
        )
    if moe_config is not True:
        raise ValueError(
            f"{name!r} is a saved model, whose parts are fixed: leave out moe_config={moe_config!r}, or give a mapping "
            "to build a new model."
        )
    path = str(Path(name).expanduser()) if Path(name).expanduser().is_dir() else name
    model = _load_weights(
        path, name, dtype=dtype or "auto", device_map=device_map, attn_implementation=attn_implementation, **hub
    )
    return LoadedModel(model, MoeLlavaProcessor.from_pretrained(path, **hub))


def _load_weights(path: str | None, name: str, **options: Any) -> MoeLlavaForConditionalGeneration:
    """`from_pretrained`, but strict: transformers only logs missing tensors, and leaves some of them uninitialised."""
    loaded: Any = MoeLlavaForConditionalGeneration.from_pretrained(path, output_loading_info=True, **options)
    model, info = loaded
    problems = {
        kind: sorted(map(str, info[kind]))
        for kind in ("missing_keys", "unexpected_keys", "mismatched_keys")
        if info[kind]
    }
    if problems:
        listed = "; ".join(
            f"{kind.replace('_', ' ')}: {', '.join(keys[:5])}" + (f" and {len(keys) - 5} more" if len(keys) > 5 else "")
            for kind, keys in problems.items()
        )
        raise ValueError(f"The weights of {name!r} do not fit its configuration. {listed}.")
    return model


def _load_generation_config(name: str, tokenizer: PreTrainedTokenizerBase, **hub: Any) -> GenerationConfig:
    try:
        generation_config = GenerationConfig.from_pretrained(name, **hub)
    except OSError:  # optional in a repo; the tokenizer knows what is needed
        generation_config = GenerationConfig(bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id)
    # TinyLlama's file says 0 (<unk>), its tokenizer </s>: what pads the prompts pads the answers.
    generation_config.pad_token_id = tokenizer.pad_token_id
    return generation_config


def _log_summary(model: MoeLlavaForConditionalGeneration) -> None:
    vision, text = model.config.vision_config, model.config.text_config
    logger.info(
        "tower %s@%s: %d patch tokens of width %d",
        vision.tower,
        vision.revision,
        vision.num_patches,
        vision.hidden_size,
    )
    logger.info("projector %s: %d image tokens per image", model.config.projector_type, model.config.num_image_tokens)
    layers = getattr(text, "moe_layer_indices", [])
    if layers:
        logger.info(
            "language model %s: %d of %d layers are mixtures of %d experts, top-%d",
            text.model_type,
            len(layers),
            text.num_hidden_layers,
            text.num_experts,
            text.num_experts_per_tok,
        )
    else:
        logger.info("language model %s: dense, %d layers", text.model_type, text.num_hidden_layers)
    logger.info("%d parameters, %d active per token", model.num_parameters(), count_active_parameters(model))
