"""A LLaVA or LLaVA-NeXT of transformers (CLIP and Llama) in, the parts of our model out.

| name | what it does |
|---|---|
| `read_llava` | config, weights and processor of a checkpoint of transformers' two classes |
| `read_mm_projector` | the projector's weights of the original code |
"""

import copy
import math
import os
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor
from transformers import (
    AutoModelForImageTextToText,
    AutoProcessor,
    BaseImageProcessor,
    CLIPImageProcessor,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaNextConfig,
    LlavaNextForConditionalGeneration,
    PreTrainedConfig,
    PreTrainedModel,
)
from typing_extensions import Unpack

from moellava.encoders._transformers import plain_config
from moellava.encoders.base import VisionEncoder
from moellava.encoders.clip import ClipEncoder, ClipVisionConfig
from moellava.messages import first_names
from moellava.model.chat_templates import multimodal_chat_template
from moellava.model.checkpoint.configs import load_model_config
from moellava.model.checkpoint.tower_identity import tower_identity
from moellava.model.configuration_moellava import MoeLlavaConfig
from moellava.model.language_model.checkpoint import Shape, causal_lm_shapes
from moellava.model.language_model.upcycling import (
    Upcycling,
    moe_config_from_dense,
    split_moe_options,
    upcycled_tensors,
)
from moellava.model.load_options import MoeChoice
from moellava.model.modeling_moellava import PROJECTOR_PREFIX, TOWER_PREFIX, joined_name
from moellava.model.processing_moellava import MoeLlavaProcessor
from moellava.model.tiling import Tiling
from moellava.storage.errors import reading
from moellava.storage.sources import HubKeywords, HubOptions, Origin, origin_of, parse_source
from moellava.storage.weights import (
    read_weights,
    require_covered,
    require_loaded,
    require_own_files,
)

MODEL_TYPES = (LlavaConfig.model_type, LlavaNextConfig.model_type)
AnyLlava: TypeAlias = LlavaForConditionalGeneration | LlavaNextForConditionalGeneration

PROJECTOR_TYPE = "mlp2x_gelu"
# transformers' names of the projector's layers, and ours, which are the original LLaVA's.
PROJECTOR_KEYS = {"linear_1": "0", "linear_2": "2"}


class LlavaParts(NamedTuple):
    """What the builder needs: `state_dict` has the names of `MoeLlavaForConditionalGeneration`."""

    config: MoeLlavaConfig
    state_dict: dict[str, Tensor]
    processor: MoeLlavaProcessor
    dtype: torch.dtype


def read_llava(
    source: str | os.PathLike[str],
    *,
    moe_config: MoeChoice = True,
    dtype: torch.dtype | None = None,
    seed: int = 0,
    **hub: Unpack[HubKeywords],
) -> LlavaParts:
    """Read a `LlavaForConditionalGeneration` or `LlavaNextForConditionalGeneration` checkpoint.

    Its tower is a CLIP, its language model a Llama; with `moe_config=False` also a Mistral.

    Args:
        source: its folder or hub id.
        moe_config: as in `load_pretrained_model`; False gives LLaVA's own function.
        dtype: of the weights; None keeps the checkpoint's.
        seed: of the routers, the only weights that the checkpoint does not hold.
        **hub: `revision`, `cache_dir`, `local_files_only`, as in transformers.

    Raises:
        OSError: if there is no such checkpoint, or a file of it is missing.
        ValueError: if it is another kind of LLaVA, or its weights do not fit its config.
    """
    name = str(Path(source).expanduser()) if Path(source).expanduser().is_dir() else str(source)
    llava_config: Any = load_model_config(name, **hub)
    _require_clip_and_llama(name, llava_config, is_dense=moe_config is False)
    llava = _load_llava(name, llava_config, HubOptions(**hub))
    dtype = dtype or llava.dtype
    own_processor = _load_processor(name, llava_config, HubOptions(**hub))
    origin = origin_of(name, HubOptions(**hub))
    encoder = _clip_encoder(origin, llava, own_processor.image_processor)

    text_config = llava_config.text_config
    reader = LanguageModelOf(name, llava)
    if moe_config is False:
        tensors = {key: reader.read(key, dtype) for key in causal_lm_shapes(text_config)}
    else:
        options, upcycling = split_moe_options(moe_config)
        text_config = moe_config_from_dense(text_config, **options)
        how = Upcycling(seed=seed, **upcycling)
        tensors = dict(upcycled_tensors(reader, text_config, how, dtype=dtype))

    state_dict = {joined_name(key): value for key, value in tensors.items()}
    tower = {f"tower.{key}": value for key, value in llava.model.vision_tower.state_dict().items()}
    for key, value in tower.items():
        state_dict[f"{TOWER_PREFIX}{key}"] = value.to(dtype)
    for key, value in _projector_of(llava).items():
        state_dict[f"{PROJECTOR_PREFIX}{key}"] = value.to(dtype)
    tiling = _tiling(name, llava_config, own_processor.image_processor, encoder)
    if tiling is not None:
        state_dict["model.image_newline"] = llava.model.image_newline.detach().to(dtype)
    config = MoeLlavaConfig(
        vision_config=encoder.config,
        text_config=text_config,
        image_token_id=llava_config.image_token_index,
        projector_type=PROJECTOR_TYPE,
        tiling=tiling,
        language_model=origin.name,
        language_model_revision=origin.revision,
        projector_tower=asdict(tower_identity(encoder.config, tower)),
        dtype=dtype,
    )
    processor = MoeLlavaProcessor(
        encoder.image_processor if tiling is None else own_processor.image_processor,
        own_processor.tokenizer,
        num_image_tokens=config.num_image_tokens,
        chat_template=own_processor.chat_template
        or multimodal_chat_template(own_processor.tokenizer),
        tiling=tiling,
    )
    return LlavaParts(config, state_dict, processor, dtype)


def read_mm_projector(path: str | os.PathLike[str]) -> dict[str, Tensor]:
    """The projector of an original LLaVA, MoE-LLaVA or Med-MoE run, under our projector's names.

    Args:
        path: `mm_projector.bin` or `non_lora_trainables.bin`, whose names are
            `model.mm_projector.0.weight`, ... (`mm_projector.weight` if it is a single linear
            layer); the weights file of a `LlavaForConditionalGeneration`
            (`multi_modal_projector.linear_1.weight`, ...); or a projector's own state dict. The
            folder of one of them will do. Pickles are read with `weights_only=True`.

    Returns:
        name to tensor, as `build_projector(...).load_state_dict` takes them: `0.weight`, `0.bias`,
        `2.weight`, ...

    Raises:
        OSError: if there is no such file.
        ValueError: if the file holds no projector.
    """
    file = _projector_file(Path(path).expanduser())
    weights = read_weights(file)
    for marker in ("mm_projector.", "multi_modal_projector."):
        found = {key.split(marker, 1)[1]: value for key, value in weights.items() if marker in key}
        if found:
            break
    else:
        found = weights
    # MoE-LLaVA and Med-MoE keep a projector for images beside one for videos.
    found = {
        _own_projector_key(key.removeprefix("image_spatial_proj.")): value
        for key, value in found.items()
        if not key.startswith("video_")
    }
    strange = [
        key
        for key in found
        if key.rsplit(".", 1)[-1] not in ("weight", "bias") or key.count(".") > 1
    ]
    if strange:
        raise ValueError(
            f"{file} holds no projector: expected names such as 'model.mm_projector.0.weight', "
            f"found {first_names(sorted(weights))}. Give LLaVA's mm_projector.bin."
        )
    return found


def _projector_file(path: Path) -> Path:
    if path.is_file():
        return path
    names = ("mm_projector.safetensors", "mm_projector.bin", "non_lora_trainables.bin")
    for name in names:
        if (path / name).is_file():
            return path / name
    raise FileNotFoundError(
        f"No projector at {path}: expected a file, or a folder with one of {', '.join(names)}."
    )


def _own_projector_key(key: str) -> str:
    layer, _, kind = key.rpartition(".")
    return f"{PROJECTOR_KEYS[layer]}.{kind}" if layer in PROJECTOR_KEYS else key


def _projector_of(llava: AnyLlava) -> dict[str, Tensor]:
    weights = llava.model.multi_modal_projector.state_dict()
    return {_own_projector_key(key): value for key, value in weights.items()}


def _require_clip_and_llama(name: str, config: Any, *, is_dense: bool) -> None:
    if config.model_type not in MODEL_TYPES:
        raise ValueError(f"{name!r} is a {config.model_type!r} checkpoint, not a LLaVA.")
    text_type = config.text_config.model_type
    if text_type == "mistral" and not is_dense:
        raise ValueError(
            f"The LLaVA checkpoint {name!r} has a Mistral, which can be read as it is, but not "
            "made a mixture. Give moe_config=False."
        )
    expected = {
        "vision_config.model_type": (config.vision_config.model_type, "clip_vision_model"),
        "text_config.model_type": (text_type, "mistral" if text_type == "mistral" else "llama"),
        "projector_hidden_act": (config.projector_hidden_act, "gelu"),
        "multimodal_projector_bias": (config.multimodal_projector_bias, True),
    }
    if config.model_type == LlavaNextConfig.model_type:
        strategy = config.vision_feature_select_strategy
        expected["vision_feature_select_strategy"] = (strategy, "default")
    for field, (found, wanted) in expected.items():
        if found != wanted:
            raise ValueError(
                f"The LLaVA checkpoint {name!r} has {field}={found!r}, but only {wanted!r} can be "
                "read. To join its parts anew, give {'model_name_or_path': ..., "
                "'mm_vision_tower': ...}."
            )


def _tiling(
    name: str, config: Any, image_processor: Any, encoder: VisionEncoder
) -> dict[str, Any] | None:
    """How a LLaVA-NeXT sees a large image, as fields of `Tiling`; None for a LLaVA.

    Raises:
        ValueError: if its processor cuts images in another way than its model expects, or into
            tiles of another size than its tower's.
    """
    if config.model_type != LlavaNextConfig.model_type:
        return None
    pinpoints = [list(size) for size in config.image_grid_pinpoints]
    cut = [list(size) for size in getattr(image_processor, "image_grid_pinpoints", None) or []]
    if cut != pinpoints:
        raise ValueError(
            f"In {name!r} image_grid_pinpoints are {pinpoints} in the config, but {cut} in the "
            "processor. The two files are of different models."
        )
    height, width = encoder.config.image_hw
    if any(down % height or across % width for down, across in pinpoints):
        raise ValueError(
            f"The LLaVA checkpoint {name!r} has image_grid_pinpoints={pinpoints}, but its tower "
            f"sees {height}x{width} pixels. Only sides that are multiples of that can be read."
        )
    grids = tuple((down // height, across // width) for down, across in pinpoints)
    most = max(2, *(math.prod(grid) for grid in grids))
    return asdict(Tiling(max_tiles=most, merge="spatial_unpad", grids=grids))


def _load_llava(name: str, config: Any, hub: HubOptions) -> AnyLlava:
    """In the stored dtype, so that its tensors stay mapped to their files until they are used."""
    source = parse_source(name, hub)
    require_own_files(source)
    with reading(name, "a LLaVA"):
        with torch.device("meta"):
            outline = AutoModelForImageTextToText.from_config(copy.deepcopy(config))
        require_covered(source, outline.num_parameters())
        loaded: Any = AutoModelForImageTextToText.from_pretrained(
            name,
            trust_remote_code=False,
            dtype="auto",
            output_loading_info=True,
            ignore_mismatched_sizes=True,
            **hub.keywords,
        )
    llava: AnyLlava
    llava, info = loaded
    require_loaded(name, info)
    return llava


def _load_processor(name: str, config: Any, hub: HubOptions) -> Any:
    try:
        with reading(name, "a processor"):
            processor = AutoProcessor.from_pretrained(name, trust_remote_code=False, **hub.keywords)
    except (OSError, ValueError) as error:
        raise OSError(
            f"The LLaVA checkpoint {name!r} has no processor that can be read "
            "(processor_config.json, preprocessor_config.json and the tokenizer's files belong to "
            f"it): {error}"
        ) from error
    tokenizer = getattr(processor, "tokenizer", None)
    found = None if tokenizer is None else tokenizer.get_vocab().get("<image>")
    if found != config.image_token_index:
        has = "no token <image>" if found is None else f"<image> at {found}"
        raise ValueError(
            f"In {name!r} the config has image_token_index={config.image_token_index}, but the "
            f"tokenizer has {has}. The two files are of different models."
        )
    return processor


def _clip_encoder(
    origin: Origin, llava: AnyLlava, image_processor: BaseImageProcessor
) -> VisionEncoder:
    """The tower as an encoder without weights, with LLaVA's image processor.

    A LLaVA-NeXT's also cuts tiles; a CLIP's with its other settings sees one view of an image.

    Its config measures the shapes.
    """
    llava_config = llava.config
    if llava_config.model_type == LlavaNextConfig.model_type:
        image_processor = CLIPImageProcessor(**plain_config(image_processor))
    assert isinstance(llava_config.vision_config, PreTrainedConfig)
    config = ClipVisionConfig(
        tower_config=plain_config(llava_config.vision_config),
        processor_config=plain_config(image_processor),
        tower=origin.name,
        revision=origin.revision,
        select_layer=llava_config.vision_feature_layer,
        select_feature=llava_config.vision_feature_select_strategy,
    )
    with torch.device("meta"):
        return ClipEncoder(config)


class LanguageModelOf:
    """The Llama inside a loaded multimodal model, a LLaVA or ours: a `TensorReader`."""

    def __init__(self, source: str, model: PreTrainedModel) -> None:
        self.source = source
        self._config = model.config.get_text_config()
        modules = {"model": model.model.language_model, "lm_head": model.lm_head}
        self._tensors: dict[str, Tensor] = {
            f"{prefix}.{key}": value
            for prefix, module in modules.items()
            for key, value in module.state_dict().items()
        }

    def config(self) -> PreTrainedConfig:
        return self._config

    def names(self) -> list[str]:
        return sorted(self._tensors)

    def shape(self, name: str) -> Shape:
        return tuple(self._tensors[name].shape)

    def read(self, name: str, dtype: torch.dtype | None = None) -> Tensor:
        tensor = self._tensors[name]
        return tensor if dtype is None else tensor.to(dtype)
