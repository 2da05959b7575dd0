"""`load_pretrained_model` joins an image encoder and a language model, or opens a saved model."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TypedDict

import torch
from huggingface_hub.utils.tqdm import (
    are_progress_bars_disabled,
    disable_progress_bars,
    enable_progress_bars,
)
from transformers import BaseImageProcessor
from transformers.utils import logging as transformers_logging
from typing_extensions import Unpack

from moellava.encoders import VisionEncoder
from moellava.model.builder.assembly import assemble
from moellava.model.builder.parts import load_encoder, load_tokenizer
from moellava.model.builder.request import (
    CustomVisionConfig,
    is_description_file,
    read_build_request,
)
from moellava.model.checkpoint.configs import load_model_config
from moellava.model.checkpoint.opening import open_saved
from moellava.model.describe import describe, log_language_model, log_vision
from moellava.model.load_options import DeviceMap, LoadOptions, MoeChoice
from moellava.model.loaded_model import LoadedModel
from moellava.model.projector import build_projector
from moellava.model.quantization import MoellavaQuantizationConfig
from moellava.storage.sources import HubOptions
from moellava.storage.weights import as_dtype, require_device

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


class EncoderLoading(TypedDict, total=False):
    """The keywords of `load_vision_encoder`, as in `create_encoder`."""

    load_text: bool
    fallback_to_default: bool
    device: torch.device | str | None
    dtype: torch.dtype | str | None
    revision: str | None
    cache_dir: str | Path | None
    local_files_only: bool
    token: str | bool | None


def load_pretrained_model(
    model: object,
    *,
    encoder_type: str | None = None,
    custom_vision_config: object = None,
    projector_config: object = None,
    moe_config: MoeChoice = True,
    device: str | torch.device | None = None,
    device_map: DeviceMap | None = None,
    dtype: torch.dtype | str | None = None,
    attn_implementation: str | None = None,
    load_in_8bit: bool = False,
    load_in_4bit: bool = False,
    revision: str | None = None,
    cache_dir: str | Path | None = None,
    local_files_only: bool = False,
    token: str | bool | None = None,
    fallback_to_default: bool = False,
    seed: int = 0,
    progress: bool = False,
) -> LoadedModel:
    """Build a multimodal model from its parts, or open a saved one.

    Args:
        model: what to load. A mapping, dataclass or object, or a YAML or JSON file with the keys of
            `moellava.model.builder.request.BuildRequest`: `model_name_or_path` (language model),
            `mm_vision_tower` and, if wanted, `mm_hidden_size`, `encoder_type`, `projector_type`,
            ... and the encoder's options (`image_size`, `patch_tokens`, ...: see
            `moellava.encoders.encoder_options`); or the folder or hub id of a model that this
            library saved, or of a transformers LLaVA (CLIP and Llama).
        encoder_type: `biomedclip`, `clip`, ...; None detects it from the tower's name.
        custom_vision_config: `CustomVisionConfig` or anything with its fields.
        projector_config: `{"path": ...}` loads a trained projector, strictly (see
            `moellava.model.checkpoint.projector_file.read_projector`); `{"type": ..., <options of
            that type>}` says what kind a fresh one is. A mapping, a dataclass or an object.
        moe_config: True makes the language model a sparse mixture of experts by default rules, a
            mapping sets fields of `LlamaMoeConfig` (`num_experts`, `moe_layers`, ...) and how its
            weights are made (`noise`, `router`, `keep_function`: see `upcycled_state_dict`), False
            keeps it dense. A language model that is already a mixture (Mixtral, MoE-LLaVA's, one of
            ours) is taken as it is.
        device: where the model goes; None leaves it on the CPU.
        device_map: spread a saved model over devices, as in transformers; in place of `device`.
        dtype: of all weights but the routers, such as `torch.bfloat16` or "bfloat16"; None takes
            the language model's own, as stored.
        attn_implementation: `sdpa`, `eager`, `flash_attention_2`, ...; None lets transformers
            choose.
        load_in_8bit, load_in_4bit: round the language model's attention, MLPs and experts while
            they are read; see `MoellavaQuantizationConfig`. The model may be saved and opens
            rounded again. Quick in bfloat16 on a CPU.
        revision: commit, tag or branch on the hub of a saved model, or of the language model; the
            tower's is the key `mm_vision_tower_revision`.
        cache_dir, local_files_only, token: as in transformers.
        fallback_to_default: if a BiomedCLIP tower cannot be loaded, take the default BiomedCLIP,
            with a warning; the config records which tower was really loaded.
        seed: of the weights that no file holds: the projector and the routers.
        progress: show transformers' bars while weights are read. A download's bar is
            huggingface_hub's, which its own `disable_progress_bars` turns off.

    Returns:
        `LoadedModel`, which unpacks into `(model, image_processor, tokenizer, context_len)` and has
        `processor` and `answer` besides. The model is in evaluation mode.

    Raises:
        ValueError: settings that are unknown, missing, contradictory or do not fit the parts.
        OSError: parts that cannot be found or read.
    """
    hub = HubOptions(
        revision=revision, cache_dir=cache_dir, local_files_only=local_files_only, token=token
    )
    options = LoadOptions(
        dtype=as_dtype(dtype),
        attn_implementation=attn_implementation,
        quantization_config=_quantization_config(load_in_8bit, load_in_4bit),
        device_map=device_map,
        moe_config=moe_config,
        seed=seed,
    )
    require_device(device)
    is_saved = isinstance(model, str | Path) and not is_description_file(model)
    _require_one_place(device, device_map, is_saved)
    with progress_bars(progress):
        if is_saved:
            _require_no_parts(
                str(model),
                encoder_type=encoder_type,
                custom_vision_config=custom_vision_config,
                projector_config=projector_config,
                fallback_to_default=fallback_to_default or None,
            )
            loaded = open_saved(str(model), options, hub)
            log_vision(loaded.model)
        else:
            request = read_build_request(
                model,
                encoder_type=encoder_type,
                custom_vision_config=custom_vision_config,
                projector_config=projector_config,
            )
            loaded = assemble(request, options, hub, fallback_to_default=fallback_to_default)
    log_language_model(loaded.model)
    if device is not None:
        # transformers' decorator hides the signature of `to`
        loaded.model.to(device)  # type: ignore[arg-type]
    loaded.model.eval()  # type: ignore[no-untyped-call]
    return loaded


def load_vision_encoder(
    config: object,
    encoder_type: str | None = None,
    custom_vision_config: object = None,
    **options: Unpack[EncoderLoading],
) -> tuple[VisionEncoder, BaseImageProcessor]:
    """Load the image encoder that a model description names, and its image processor.

    Args:
        config: the mapping, dataclass or object that `load_pretrained_model` takes; or just the
            tower's id or folder.
        encoder_type, custom_vision_config: as in `load_pretrained_model`.
        **options: as in `create_encoder` (`device`, `dtype`, `revision`, `cache_dir`, ...).
    """
    if isinstance(config, str | Path) and not is_description_file(config):
        config = {"mm_vision_tower": str(config)}
    request = read_build_request(
        config,
        encoder_type=encoder_type,
        custom_vision_config=custom_vision_config,
        required=("mm_vision_tower",),
    )
    encoder = load_encoder(
        request,
        HubOptions(
            revision=options.get("revision") or request.mm_vision_tower_revision,
            cache_dir=options.get("cache_dir"),
            local_files_only=options.get("local_files_only", False),
            token=options.get("token"),
        ),
        load_text=options.get("load_text", False),
        fallback_to_default=options.get("fallback_to_default", False),
        device=options.get("device"),
        dtype=options.get("dtype"),
    )
    return encoder, encoder.image_processor


def _quantization_config(in_8bit: bool, in_4bit: bool) -> MoellavaQuantizationConfig | None:
    if in_8bit and in_4bit:
        raise ValueError("load_in_8bit and load_in_4bit are both given; give one of them.")
    if not in_8bit and not in_4bit:
        return None
    return MoellavaQuantizationConfig(bits=8 if in_8bit else 4)


def _require_one_place(
    device: str | torch.device | None, device_map: DeviceMap | None, is_saved: bool
) -> None:
    if device is not None and device_map is not None:
        raise ValueError(
            f"device is {device!r} and device_map is {device_map!r}; give one of them."
        )
    if device_map is not None and not is_saved:
        raise ValueError(
            "device_map is for a saved model: build, save_pretrained, and open the folder with it."
        )


def _require_no_parts(name: str, **given: object) -> None:
    """The parts of a saved model are in it: settings of parts are for a new one."""
    if settings := [setting for setting, value in given.items() if value is not None]:
        raise ValueError(
            f"{name!r} is a saved model, whose parts are fixed: leave out "
            f"{' and '.join(settings)}, or give a mapping to build a new model."
        )


@contextmanager
def progress_bars(shown: bool) -> Iterator[None]:
    """Show or hide transformers' bars for a while.

    transformers' switch turns huggingface_hub's download bars too, so those are set back.
    """
    was_shown = transformers_logging.is_progress_bar_enabled()
    downloads_shown = not are_progress_bars_disabled()
    _switch(shown, downloads_shown)
    try:
        yield
    finally:
        _switch(was_shown, downloads_shown)


def _switch(shown: bool, downloads_shown: bool) -> None:
    if shown:
        transformers_logging.enable_progress_bar()
    else:
        transformers_logging.disable_progress_bar()
    if downloads_shown:
        enable_progress_bars()
    else:
        disable_progress_bars()
