"""An open_clip checkpoint as an encoder, BiomedCLIP first: pixels in, its patch tokens out.

`BiomedClipVisionConfig`, `BiomedClipEncoder`. The image tower is open_clip's own module (a timm
trunk, its `VisionTransformer`, or its `ModifiedResNet`) under the name `visual`, so keys are those
of the checkpoint.
"""

import inspect
import logging
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from typing_extensions import Self

from moellava.encoders.base import VisionEncoder, check_divisible
from moellava.encoders.batches import pixel_batches
from moellava.encoders.configuration import OptionValue, check_options
from moellava.encoders.open_clip.configuration import BiomedClipVisionConfig
from moellava.encoders.open_clip.files import CONFIG_FILE as OPEN_CLIP_CONFIG
from moellava.encoders.open_clip.files import is_saved_encoder, read_open_clip_config, resolve
from moellava.encoders.open_clip.image_processor import BiomedClipImageProcessor
from moellava.encoders.open_clip.patch_text import (
    last_block,
    project_patches,
    require_projectable,
)
from moellava.encoders.open_clip.text import (
    ClipText,
    Tokenizer,
    load_tokenizer,
    text_settings,
    without_local_paths,
)
from moellava.encoders.open_clip.text import load_text as read_text
from moellava.encoders.open_clip.towers import (
    OpenClipModule,
    build_visual,
    fill_computed_buffers,
    interpolate_positions,
    read_tower,
)
from moellava.encoders.outputs import LayerTokens, TrunkOutput
from moellava.images import Images
from moellava.images.threads import as_image_list
from moellava.storage.errors import reading
from moellava.storage.sources import JsonObject, Source, parse_source
from moellava.storage.weights import assign_weights, require_finite

logger = logging.getLogger(__name__)

E = TypeVar("E", bound=nn.Module)


class BiomedClipEncoder(VisionEncoder):
    """Patch tokens of an open_clip image tower.

    Real tokens wherever the trunk has a hidden state or a feature map; a tower that only pools gets
    synthesized ones. `pooled` is open_clip's `encode_image`, before normalisation.
    """

    config_class = BiomedClipVisionConfig
    config: BiomedClipVisionConfig
    visual: OpenClipModule
    supports_gradient_checkpointing = True

    def __init__(self, config: BiomedClipVisionConfig):
        super().__init__(config)
        self.visual = build_visual(config)
        self.text = ClipText(config) if config.text_cfg else None
        self._tokenizer: Tokenizer | None = None
        self.post_init()

    @property
    def _trunk(self) -> OpenClipModule:
        """timm's trunk, or open_clip's own tower, which is both."""
        return getattr(self.visual, "trunk", self.visual)

    @property
    def num_layers(self) -> int:
        """Blocks of a transformer; stages of a convolutional trunk, with the stem of a ResNet."""
        if hasattr(self.visual, "trunk"):
            return (
                len(self._trunk.feature_info)
                if hasattr(self._trunk, "forward_intermediates")
                else 0
            )
        return len(self._trunk.transformer.resblocks) if hasattr(self._trunk, "transformer") else 5

    @property
    def layers_are_alike(self) -> bool:
        """True for plain transformers, by timm's own table of layers."""
        if hasattr(self._trunk, "transformer"):
            return True
        layers = getattr(self._trunk, "feature_info", None) or []
        return len({(layer["num_chs"], layer["reduction"]) for layer in layers}) == 1

    @property
    def has_final_norm(self) -> bool:
        """True for transformers whose last norm is as wide as their hidden states."""
        if hasattr(self.visual, "trunk"):
            norm = getattr(self._trunk, "norm", None)
            return hasattr(self._trunk, "blocks") and not isinstance(
                norm, (nn.Identity, type(None))
            )
        return hasattr(self.visual, "ln_post") and self.visual.attn_pool is None

    def run_trunk(
        self, pixel_values: Tensor, layers: Sequence[int], *, norm: bool, pooled: bool
    ) -> TrunkOutput:
        """See `VisionEncoder.run_trunk`; `pooled` is open_clip's `encode_image`, bit for bit."""
        if not layers:
            return TrunkOutput([], _first(self.visual(pixel_values)))
        if hasattr(self.visual, "attnpool"):
            return _run_modified_resnet(self.visual, pixel_values, layers, pooled)
        is_timm = hasattr(self.visual, "trunk")
        wanted: JsonObject = {
            "indices": sorted(set(layers)),
            "output_fmt": "NCHW",  # every trunk offers this one, and it has the grid in it
            "norm" if is_timm else "normalize_intermediates": norm,
            "return_prefix_tokens" if is_timm else "output_extra_tokens": True,
            "stop_early": not pooled,
            "intermediates_only": not pooled,
        }
        offered = inspect.signature(self._trunk.forward_intermediates).parameters
        output = self._trunk.forward_intermediates(
            pixel_values, **{name: value for name, value in wanted.items() if name in offered}
        )
        if is_timm:
            final, maps = output if pooled else (None, output)
            maps, prefixes = _split_prefix(maps)
            vector = self.visual.head(self._trunk.forward_head(final)) if pooled else None
            has_class_token = (
                getattr(self._trunk, "cls_token", None) is not None
            )  # else it is all registers
        else:
            maps, prefixes = output["image_intermediates"], output["image_intermediates_prefix"]
            vector, has_class_token = output.get("image_features"), True
        order = [wanted["indices"].index(layer) for layer in layers]
        tokens = [
            _as_tokens(maps[i], prefixes[i] if prefixes and has_class_token else None)
            for i in order
        ]
        return TrunkOutput(tokens, vector)

    def build_image_processor(self) -> BiomedClipImageProcessor:
        """open_clip's transform for this tower, at the encoder's image size."""
        return BiomedClipImageProcessor.from_open_clip(
            self.config.preprocess_cfg or {}, self.config.image_hw
        )

    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)  # type: ignore[no-untyped-call]
        # Swin's indices and EVA's rotary tables are not in checkpoints: from_pretrained leaves them
        # as found.
        init_buffers: Callable[[], None] | None = getattr(
            module, "init_non_persistent_buffers", None
        )
        if init_buffers is not None:
            init_buffers()
        # Of open_clip's text tower.
        build_mask: Callable[[], Tensor] | None = getattr(module, "build_causal_mask", None)
        if build_mask is not None and getattr(module, "attn_mask", None) is not None:
            module.attn_mask = build_mask().to(self.device)

    def _set_gradient_checkpointing(
        self, enable: bool = True, *args: object, **kwargs: object
    ) -> None:
        if hasattr(self.visual, "attnpool"):
            raise ValueError(
                "open_clip's ModifiedResNet has no activation checkpointing; leave it off."
            )
        self._trunk.set_grad_checkpointing(
            enable
        )  # timm's and open_clip's blocks have their own switch

    def resize_trunk(self) -> None:
        """Interpolate the position embedding to the config's image size."""
        patch_embed = getattr(self._trunk, "patch_embed", self._trunk)
        check_divisible(self.config.image_hw, getattr(patch_embed, "patch_size", None))
        if hasattr(self.visual, "trunk"):
            self.visual.set_input_size(self.config.image_hw)
        else:
            interpolate_positions(self.visual, self.config)

    def encode_text(self, texts: Sequence[str]) -> Tensor:
        """Unit vectors (B, P) of texts in the space of `pooled`; needs `load_text=True`."""
        text = self._text_side
        if isinstance(texts, str):
            texts = [texts]
        with torch.inference_mode():
            vectors: Tensor = text(self.tokenizer(list(texts)).to(self.device))
        require_finite("The text tower", vectors)
        return vectors

    def zero_shot(
        self, images: Images, labels: Sequence[str], template: str = "this is a photo of {}"
    ) -> Tensor:
        """Probabilities (B, L) of labels for images, equal to open_clip's; needs `load_text=True`.

        Args:
            images: see `encode`.
            template: the sentence around a label, with one `{}`.
        """
        if isinstance(labels, str) or not labels:
            raise ValueError(f"labels is {labels!r}; give a list of at least one label.")
        if "{}" not in template:
            raise ValueError(f"template is {template!r}; it needs a {{}} where the label goes.")
        text = self._text_side
        text_vectors = self.encode_text([template.format(label) for label in labels])
        with torch.inference_mode():
            vectors = [
                self.visual_vectors(pixels)
                for pixels in pixel_batches(self, as_image_list(images), batch_size=16)
            ]
            image_vectors = torch.cat(vectors)
            require_finite("The image tower", image_vectors)
            return text.probabilities(image_vectors, text_vectors)

    def visual_vectors(self, pixel_values: Tensor) -> Tensor:
        """Unit vectors (B, P) of images in the space of `encode_text`."""
        pooled = self.run_trunk(pixel_values, [], norm=False, pooled=True).pooled
        assert pooled is not None
        return nn.functional.normalize(pooled, dim=-1)

    def patch_similarity(
        self, image: Any, texts: Sequence[str], *, attention: str = "own"
    ) -> Tensor:
        """Cosine of each patch with each text, (texts, rows, columns); needs `load_text=True`.

        CLIP was trained on whole images: its last layers gather what an image shows into tokens
        anywhere, so that a patch need not say what lies at its own place. Compare texts, do not
        threshold.

        Args:
            image: one image, see `encode`.
            attention: of the last block; "own", or "value": value-value attention without residual
                and MLP (timm's transformers only), which keeps patches to their own content.

        Raises:
            ValueError: for a tower without patches that the texts' space could take.
        """
        if isinstance(texts, str) or not texts:
            raise ValueError(f"texts is {texts!r}; give a list of at least one text.")
        require_projectable(self.visual, attention)
        text_vectors = self.encode_text(texts)
        (pixels,) = pixel_batches(self, as_image_list([image]), batch_size=1)
        with torch.inference_mode(), last_block(self.visual, attention):
            trunk = self.run_trunk(pixels, [self.num_layers - 1], norm=True, pooled=False)
            vectors = project_patches(self.visual, trunk.layers[0].patches)
        require_finite("The image tower", vectors)
        return (text_vectors @ vectors[0].T).view(len(texts), *trunk.layers[0].grid)

    @property
    def tokenizer(self) -> Tokenizer:
        """open_clip's tokenizer of the text tower."""
        if self._tokenizer is None:
            self._tokenizer = load_tokenizer(self.config, parse_source(self.config._name_or_path))
        return self._tokenizer

    @property
    def _text_side(self) -> ClipText:
        if self.text is None:
            raise ValueError(
                f"{self._label} was loaded without its text tower: load it with load_text=True."
            )
        return self.text

    def save_pretrained(
        self, save_directory: str | os.PathLike[str], *args: Any, **kwargs: Any
    ) -> None:
        """Write config, weights, image processor and, with a text tower, its tokenizer."""
        super().save_pretrained(save_directory, *args, **kwargs)
        save_tokenizer = getattr(self.tokenizer, "save_pretrained", None) if self.text else None
        if save_tokenizer is not None:
            save_tokenizer(save_directory)

    @classmethod
    def is_foreign(cls, source: Source) -> bool:
        """Whether the source is an open_clip repo, folder or file."""
        return not is_saved_encoder(source)

    @classmethod
    def tower_files(
        cls, source: Source, *, download: bool = False
    ) -> list[tuple[str, Path | None]]:
        """(name, path) of the files that would be loaded; None is not on this machine."""
        if is_saved_encoder(source, download=download):
            return super().tower_files(source, download=download)
        files = resolve(source, download=download)
        return [(OPEN_CLIP_CONFIG, files.config_file), (files.weights_name, files.weights_file)]

    @classmethod
    def load(  # type: ignore[override]  # one option more
        cls,
        source: Source,
        *,
        image_size: int | Sequence[int] | None = None,
        dtype: torch.dtype | str | None = None,
        device: torch.device | str | None = None,
        load_text: bool = False,
        **options: OptionValue,
    ) -> Self:
        """Load an open_clip checkpoint, and its text tower only with `load_text`.

        Weights stay mapped to their file until they are used.
        """
        check_options(cls.config_class, options)
        files = resolve(source, download=True)
        config_file, weights_file = files.paths
        open_clip_config = read_open_clip_config(config_file)
        model_cfg = open_clip_config["model_cfg"]
        text = text_settings(model_cfg, files.source, weights_file) if load_text else {}
        with reading(config_file, "the config of an open_clip model"):
            settings: JsonObject = {
                "vision_cfg": model_cfg["vision_cfg"],
                "embed_dim": model_cfg["embed_dim"],
                "quick_gelu": bool(model_cfg.get("quick_gelu", False)),
                "preprocess_cfg": open_clip_config.get("preprocess_cfg"),
            }
            with torch.device("meta"):
                build_visual(BiomedClipVisionConfig(**settings))  # what the file says can be built
        chosen: JsonObject = {**text, **options}
        config = BiomedClipVisionConfig(
            **settings, tower=source.name, revision=files.source.revision, **chosen
        )
        with torch.device("meta"):
            encoder = cls(config)
        weights = read_tower(weights_file, "visual.")
        assign_weights(encoder.visual, weights, where=str(weights_file))
        if not fill_computed_buffers(encoder.visual):
            encoder.visual = build_visual(config)  # slower: every weight is initialised first
            assign_weights(encoder.visual, weights, where=str(weights_file))
        if load_text:
            encoder.text = read_text(config, weights_file)
            encoder._tokenizer = load_tokenizer(config, files.source)
            config.text_cfg = without_local_paths(config.text_cfg or {})
        encoder = _to(encoder, device, dtype).eval()  # type: ignore[no-untyped-call]
        if image_size is not None:
            encoder.set_image_size(image_size)
        encoder.log_tower()
        return encoder


def _to(encoder: E, device: torch.device | str | None, dtype: torch.dtype | str | None) -> E:
    """Move an encoder; dtype None is float32, as in open_clip, "auto" that of the file."""
    if isinstance(dtype, str):
        return encoder.to(device) if dtype == "auto" else encoder.to(device, getattr(torch, dtype))
    return encoder.to(device, dtype or torch.float32)


def _run_modified_resnet(
    visual: OpenClipModule, x: Tensor, layers: Sequence[int], pooled: bool
) -> TrunkOutput:
    """The stages by hand: open_clip 3.3's own loop stops early exactly when it is told not to."""
    stages = (visual.stem, visual.layer1, visual.layer2, visual.layer3, visual.layer4)
    maps = []
    for stage in stages if pooled else stages[: max(layers) + 1]:
        x = stage(x)
        maps.append(x)
    return TrunkOutput(
        [_as_tokens(maps[i], None) for i in layers], visual.attnpool(x) if pooled else None
    )


def _split_prefix(
    intermediates: list[Tensor] | list[tuple[Tensor, Tensor]],
) -> tuple[list[Tensor], list[Tensor] | None]:
    """timm returns pairs (map, prefix) where the trunk has class or register tokens, else maps."""
    pairs = [item for item in intermediates if isinstance(item, tuple)]
    if not pairs:
        return [item for item in intermediates if isinstance(item, Tensor)], None
    return [feature_map for feature_map, _ in pairs], [prefix for _, prefix in pairs]


def _as_tokens(feature_map: Tensor, prefix: Tensor | None) -> LayerTokens:
    """(B, D, rows, columns) -> tokens (B, N, D) by rows; the class token is first in the prefix."""
    rows, columns = feature_map.shape[2], feature_map.shape[3]
    class_token = prefix if prefix is None else prefix[:, :1]
    return LayerTokens(class_token, feature_map.flatten(2).transpose(1, 2), (rows, columns))


def _first(output: Tensor | tuple[Tensor, Tensor]) -> Tensor:
    return output[0] if isinstance(output, tuple) else output  # CoCa's tower also returns tokens
