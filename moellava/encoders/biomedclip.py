"""Any open_clip checkpoint as an encoder, BiomedCLIP first: pixels in, patch tokens of its trunk out.

`BiomedClipVisionConfig`, `BiomedClipEncoder`. The image tower is open_clip's own module (a timm trunk, open_clip's
`VisionTransformer`, or its `ModifiedResNet`) under the name `visual`, so keys are those of the checkpoint.
"""

import copy
import inspect
import logging
from collections.abc import Sequence
from typing import Any

import torch
from huggingface_hub.dataclasses import strict
from torch import Tensor, nn

from moellava.encoders.base import LayerTokens, TrunkOutput, VisionEncoder, VisionEncoderConfig
from moellava.encoders.images import BiomedClipImageProcessorPil
from moellava.encoders.sources import Source, parse_source, read_open_clip_config, read_weights, resolve

logger = logging.getLogger(__name__)

# microsoft/BiomedCLIP-PubMedBERT_256-vit_base_patch16_224, as its open_clip_config.json says.
BIOMEDCLIP = "microsoft/BiomedCLIP-PubMedBERT_256-vit_base_patch16_224"
BIOMEDCLIP_VISION_CFG = {
    "timm_model_name": "vit_base_patch16_224",
    "timm_model_pretrained": False,
    "timm_pool": "",
    "timm_proj": "linear",
    "image_size": 224,
}


@strict
class BiomedClipVisionConfig(VisionEncoderConfig):
    """An open_clip image tower: `vision_cfg`, `embed_dim`, `quick_gelu` and `preprocess_cfg` as open_clip has them.

    The default is BiomedCLIP. `vision_cfg["image_size"]` is the size the tower was trained at; `image_size` the
    size it takes now.
    """

    model_type = "biomedclip_vision"

    image_size: int | list[int] | tuple[int, int] | None = None  # None: the trained size
    vision_cfg: dict | None = None
    embed_dim: int = 512
    quick_gelu: bool = False
    preprocess_cfg: dict | None = None

    def __post_init__(self, **kwargs: Any) -> None:
        if self.vision_cfg is None:
            self.vision_cfg = dict(BIOMEDCLIP_VISION_CFG)
        if self.image_size is None:
            self.image_size = self.vision_cfg.get("image_size", 224)
        self.preprocess_cfg = dict(self.preprocess_cfg or {})
        super().__post_init__(**kwargs)

    @property
    def trained_hw(self) -> tuple[int, int]:
        """(height, width) that the weights were trained at."""
        trained = self.vision_cfg.get("image_size", 224)
        return (trained, trained) if isinstance(trained, int) else tuple(trained)


class BiomedClipEncoder(VisionEncoder):
    """Patch tokens of an open_clip image tower.

    Real tokens wherever the trunk has a hidden state or a feature map; a tower that only pools gets synthesized
    ones. `pooled` is open_clip's `encode_image`, before normalisation.
    """

    config_class = BiomedClipVisionConfig
    config: BiomedClipVisionConfig

    def __init__(self, config: BiomedClipVisionConfig):
        super().__init__(config)
        self.visual = build_visual(config)
        self.post_init()

    @property
    def num_layers(self) -> int:
        """Blocks of a transformer; stages of a convolutional trunk."""
        trunk = getattr(self.visual, "trunk", None)
        if trunk is not None:
            return len(trunk.feature_info) if hasattr(trunk, "forward_intermediates") else 0
        if hasattr(self.visual, "transformer"):
            return len(self.visual.transformer.resblocks)
        return 5  # ModifiedResNet: stem and four stages

    def run_trunk(
        self, pixel_values: Tensor, layers: Sequence[int], *, norm: bool, pooled: bool
    ) -> TrunkOutput:
        """See `VisionEncoder.run_trunk`; the pooled vector is bit-equal to open_clip's `encode_image`."""
        if not layers:
            return TrunkOutput([], _first(self.visual(pixel_values)))
        trunk = getattr(self.visual, "trunk", None)
        forward = trunk.forward_intermediates if trunk is not None else self.visual.forward_intermediates
        offered = inspect.signature(forward).parameters
        wanted: dict[str, Any] = {
            "indices": sorted(set(layers)),
            "output_fmt": "NCHW",
            "stop_early": not pooled,
        }
        wanted["norm" if trunk is not None else "normalize_intermediates"] = norm
        has_prefix = "return_prefix_tokens" if trunk is not None else "output_extra_tokens"
        wanted |= {has_prefix: True, "intermediates_only": not pooled}
        output = forward(pixel_values, **{name: value for name, value in wanted.items() if name in offered})
        if trunk is None:
            maps, prefixes = output["image_intermediates"], output.get("image_intermediates_prefix")
            vector = output.get("image_features")
        else:
            final, intermediates = output if pooled else (None, output)
            maps, prefixes = _split_prefix(intermediates)
            vector = self.visual.head(trunk.forward_head(final)) if pooled else None
        position = {layer: i for i, layer in enumerate(wanted["indices"])}
        tokens = [
            _as_tokens(maps[position[layer]], prefixes[position[layer]] if prefixes else None)
            for layer in layers
        ]
        return TrunkOutput(tokens, vector)

    def build_image_processor(self) -> BiomedClipImageProcessorPil:
        """open_clip's transform for this tower, at the encoder's image size."""
        return BiomedClipImageProcessorPil.from_open_clip(self.config.preprocess_cfg, self.config.image_size)

    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        # Swin's indices and EVA's rotary tables are not in checkpoints: from_pretrained leaves them as found.
        if hasattr(module, "init_non_persistent_buffers"):
            module.init_non_persistent_buffers()

    def _set_gradient_checkpointing(self, enable: bool = True, *args: Any, **kwargs: Any) -> None:
        self.visual.set_grad_checkpointing(enable)  # timm's and open_clip's blocks have their own switch

    def set_image_size(self, image_size: int | Sequence[int]) -> None:
        """Take another image size: the position embedding is interpolated, grid and image processor follow."""
        config = self.config
        config.image_size = image_size if isinstance(image_size, int) else list(image_size)
        if getattr(self.visual, "trunk", None) is not None:
            self.visual.set_input_size(config.image_hw)
        else:
            _interpolate_positions(self.visual, config)
        self._image_processor = None
        with torch.device("meta"):
            type(self)(config)  # measures the new shapes into the shared config

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: Any, *args: Any, **kwargs: Any) -> Any:
        """Load an open_clip repo, folder or file, or a folder that `save_pretrained` wrote.

        Args:
            pretrained_model_name_or_path: see `moellava.encoders.sources.parse_source`.
            **kwargs: `revision`, `cache_dir`, `local_files_only`, `token`; `dtype` (default float32), `device`;
                fields of the config, such as `image_size` or `select_layer`.
        """
        if (
            pretrained_model_name_or_path is None
            or args
            or not cls.is_open_clip(pretrained_model_name_or_path, kwargs)
        ):
            return super().from_pretrained(pretrained_model_name_or_path, *args, **kwargs)
        hub = {key: kwargs.pop(key) for key in _HUB_OPTIONS if key in kwargs}
        return cls.load(parse_source(pretrained_model_name_or_path, **hub), **kwargs)

    @staticmethod
    def is_open_clip(name: Any, options: dict[str, Any]) -> bool:
        """Whether the source is an open_clip checkpoint rather than one of this library's own."""
        source = parse_source(name, **{key: options[key] for key in _HUB_OPTIONS if key in options})
        is_own = source.folder is not None and (source.folder / "config.json").is_file()
        return not is_own or source.file is not None or (source.folder / "open_clip_config.json").is_file()

    @classmethod
    def load(
        cls,
        source: Source,
        *,
        image_size: int | Sequence[int] | None = None,
        dtype: torch.dtype | str | None = None,
        device: torch.device | str | None = None,
        **overrides: Any,
    ) -> "BiomedClipEncoder":
        """Load the image tower of an open_clip checkpoint; the text tower is neither built nor read.

        Weights stay mapped to their file until they are used. float32 unless `dtype` says otherwise; "auto"
        keeps the file's own.
        """
        files = resolve(source, download=True)
        assert files.config_file is not None
        assert files.weights_file is not None
        open_clip_config = read_open_clip_config(files.config_file)
        model_cfg = open_clip_config["model_cfg"]
        config = cls.config_class(
            vision_cfg=model_cfg["vision_cfg"],
            embed_dim=model_cfg["embed_dim"],
            quick_gelu=bool(model_cfg.get("quick_gelu", False)),
            preprocess_cfg=open_clip_config.get("preprocess_cfg"),
            tower=source.name,
            revision=files.source.revision,
            **overrides,
        )
        state = _visual_weights(files.weights_file)
        with torch.device("meta"):
            encoder = cls(config)
        if set(dict(encoder.named_buffers())) - set(encoder.state_dict()):
            encoder = cls(config)  # buffers that no checkpoint holds have to be computed, which meta cannot
        assign_weights(encoder.visual, state, dtype=dtype, where=str(files.weights_file))
        encoder.eval()
        if image_size is not None and config.image_hw != _hw(image_size):
            encoder.set_image_size(image_size)
        logger.info(
            "tower %s@%s: %d patch tokens of width %d, %s",
            config.tower,
            (config.revision or "local")[:7],
            config.num_patches,
            config.hidden_size,
            "synthesized" if encoder.synthesized else "real",
        )
        return encoder if device is None else encoder.to(device)


_HUB_OPTIONS = ("revision", "cache_dir", "local_files_only", "token")


def build_visual(config: BiomedClipVisionConfig) -> nn.Module:
    """open_clip's image tower for a config, with fresh weights, at the config's image size."""
    try:
        from open_clip.model import _build_vision_tower
    except ImportError as error:
        raise ImportError(
            "A BiomedCLIP tower is open_clip's: pip install open_clip_torch (3.3 or newer, which brings timm)."
        ) from error
    assert config.vision_cfg is not None
    vision_cfg = copy.deepcopy(config.vision_cfg) | {"timm_model_pretrained": False}  # never a download
    is_timm = bool(vision_cfg.get("timm_model_name"))
    if not is_timm:
        vision_cfg["image_size"] = config.image_size
    if isinstance(vision_cfg.get("layers"), (list, tuple)):  # ModifiedResNet
        height, width = config.image_hw
        if height != width:
            raise ValueError(
                f"image_size is {config.image_size}, but the attention pool of a ModifiedResNet takes squares only."
            )
        vision_cfg["image_size"] = height
    try:
        visual = _build_vision_tower(config.embed_dim, vision_cfg, config.quick_gelu)
    except (TypeError, RuntimeError) as error:
        raise ValueError(f"open_clip cannot build the image tower {config.vision_cfg}: {error}") from error
    if is_timm and config.image_hw != config.trained_hw:
        visual.set_input_size(config.image_hw)
    return visual


def assign_weights(module: nn.Module, state: dict[str, Tensor], *, dtype: Any, where: str) -> None:
    """Put tensors into a module without copying them; nothing may be missing, left over or of another shape.

    Args:
        dtype: of floating-point weights; None is float32, "auto" the file's own.
        where: the file, for messages.
    """
    if dtype != "auto":
        target = torch.float32 if dtype is None else dtype
        target = getattr(torch, target) if isinstance(target, str) else target
        state = {
            key: value.to(target) if value.is_floating_point() else value for key, value in state.items()
        }
    expected = module.state_dict()
    wrong = [
        f"{key}: {tuple(state[key].shape)} instead of {tuple(value.shape)}"
        for key, value in expected.items()
        if key in state and state[key].shape != value.shape
    ]
    if wrong:
        raise ValueError(f"{where} does not fit its config; tensors of other shapes: {_first_five(wrong)}.")
    result = module.load_state_dict(state, strict=False, assign=True)
    problems = [
        f"{word} tensors: {_first_five(sorted(keys))}"
        for word, keys in (("missing", result.missing_keys), ("unknown", result.unexpected_keys))
        if keys
    ]
    if problems:
        raise ValueError(f"{where} does not fit its config; {'; '.join(problems)}.")


def _visual_weights(path: Any) -> dict[str, Tensor]:
    state = read_weights(path, ("visual.",))
    if not state:
        others = sorted({key.split(".")[0] for key in read_weights(path)})
        raise ValueError(
            f"{path} has no tensor of an image tower (names that start with 'visual.'). It has {_first_five(others)}: "
            "a text-only checkpoint, or not an open_clip one."
        )
    return {key.removeprefix("visual."): value for key, value in state.items()}


def _interpolate_positions(visual: nn.Module, config: BiomedClipVisionConfig) -> None:
    """Resize the position embedding of open_clip's own towers, with open_clip's own function."""
    from types import SimpleNamespace

    from open_clip.model import resize_pos_embed

    with torch.device("meta"):
        target = build_visual(config)
    owner, new = (visual.attnpool, target.attnpool) if hasattr(visual, "attnpool") else (visual, target)
    side = config.image_hw[0] // 32
    grid_size = (side, side) if hasattr(visual, "attnpool") else target.grid_size
    state = {"visual.positional_embedding": owner.positional_embedding.data}
    resize_pos_embed(state, SimpleNamespace(visual=SimpleNamespace(grid_size=grid_size)))
    resized = state["visual.positional_embedding"]
    assert resized.shape == new.positional_embedding.shape
    requires_grad = owner.positional_embedding.requires_grad
    owner.positional_embedding = nn.Parameter(resized, requires_grad=requires_grad)
    for name in ("image_size", "grid_size"):
        if hasattr(target, name):
            setattr(visual, name, getattr(target, name))


def _split_prefix(intermediates: list[Any]) -> tuple[list[Tensor], list[Tensor] | None]:
    """timm returns pairs (map, prefix) where the trunk has class or register tokens, else maps."""
    if not isinstance(intermediates[0], tuple):
        return list(intermediates), None
    return [pair[0] for pair in intermediates], [pair[1] for pair in intermediates]


def _as_tokens(feature_map: Tensor, prefix: Tensor | None) -> LayerTokens:
    """(B, D, rows, columns) -> tokens (B, N, D), row by row."""
    rows, columns = feature_map.shape[2], feature_map.shape[3]
    return LayerTokens(prefix, feature_map.flatten(2).transpose(1, 2), (rows, columns))


def _first(output: Any) -> Tensor:
    return output[0] if isinstance(output, tuple) else output  # CoCa's tower also returns tokens


def _hw(image_size: int | Sequence[int]) -> tuple[int, int]:
    if isinstance(image_size, int):
        return image_size, image_size
    height, width = image_size
    return height, width


def _first_five(names: list[str]) -> str:
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")
