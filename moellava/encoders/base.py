"""The contract of every image encoder: pixels in, patch tokens out.

    B images, H x W pixels, N patches on a grid, D width of a patch token, P width of a pooled vector

`VisionEncoderConfig`, `VisionEncoder`, `VisionEncoderOutput`, `TrunkOutput`, `synthesize_patch_tokens`.
A new encoder implements `VisionEncoder.run_trunk` and `num_layers`; selection, synthesis, shapes and `encode`
follow from them.
"""

import logging
import os
from collections.abc import Sequence
from dataclasses import dataclass, fields
from difflib import get_close_matches
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from huggingface_hub.dataclasses import strict
from torch import Tensor
from transformers import PreTrainedModel
from transformers.configuration_utils import PreTrainedConfig
from transformers.utils import ModelOutput

from moellava.encoders.batches import encode_images
from moellava.storage.weights import require_loaded

if TYPE_CHECKING:
    from transformers.image_processing_utils import BaseImageProcessor

logger = logging.getLogger(__name__)

# LLaVA calls the first two "default" and "full"; "full" is whatever the trunk gives, class token or none.
SELECT_FEATURES = ("patch", "default", "cls_patch", "full", "cls")
PATCH_TOKENS = ("auto", "real", "synthesized")


@strict
class VisionEncoderConfig(PreTrainedConfig):
    """What every encoder's config says; each field is plain JSON.

    Args:
        image_size: pixels, one side or (height, width).
        patch_tokens: "auto" takes real tokens where the trunk has any, "real" insists, "synthesized" never
            does.
        select_layer: LLaVA's count of hidden states: -1 the last block's output, -2 the one before it,
            k > 0 the output of block k-1. A list concatenates along the width.
        select_feature: "patch" (or "default"), "cls_patch" (or "full"), "cls".
        final_norm: apply the trunk's last norm to the selected layers.
        tower: the tower whose weights were really loaded (a repo id, or a local folder's own name).
        revision: the commit those weights came from, where there is one.
        hidden_size, num_patches, grid: width, tokens per image after selection, (rows, columns) of patches.
            Measured from the trunk whenever an encoder is built; never chosen.
    """

    image_size: int | list[int] | tuple[int, int] = 224
    patch_tokens: str = "auto"
    select_layer: int | list[int] | tuple[int, ...] = -2
    select_feature: str = "patch"
    final_norm: bool = False
    tower: str | None = None
    revision: str | None = None
    hidden_size: int | None = None
    num_patches: int | None = None
    grid: list[int] | tuple[int, int] | None = None

    def __post_init__(self, **kwargs: Any) -> None:
        for name in ("image_size", "select_layer", "grid"):
            if isinstance(getattr(self, name), tuple):
                setattr(self, name, list(getattr(self, name)))  # what JSON gives back
        _check_choice("select_feature", self.select_feature, SELECT_FEATURES)
        _check_choice("patch_tokens", self.patch_tokens, PATCH_TOKENS)
        if self.select_layer == []:
            raise ValueError(
                "select_layer is an empty list; give a layer such as -2, or several such as [-2, -5]."
            )
        image_height, image_width = self.image_hw
        if image_height < 1 or image_width < 1:
            raise ValueError(
                f"image_size is {self.image_size}; give a positive side, or [height, width]."
            )
        super().__post_init__(**kwargs)

    @property
    def image_hw(self) -> tuple[int, int]:
        """(height, width) of the image that the encoder takes, in pixels."""
        if isinstance(self.image_size, int):
            return self.image_size, self.image_size
        if len(self.image_size) != 2:
            raise ValueError(f"image_size is {self.image_size}; give one side, or [height, width].")
        height, width = self.image_size
        return height, width

    @property
    def layers(self) -> list[int]:
        """`select_layer` as a list."""
        return (
            [self.select_layer] if isinstance(self.select_layer, int) else list(self.select_layer)
        )


@dataclass
class VisionEncoderOutput(ModelOutput):
    """Patch tokens of a batch.

    patch_tokens: (B, N, D). pooled: (B, P), or None when it was not asked for. synthesized: whether the patch
    tokens are the pooled vector repeated over the grid.
    """

    patch_tokens: Tensor | None = None
    pooled: Tensor | None = None
    synthesized: bool | None = None


class LayerTokens(NamedTuple):
    """Output of one layer: `class_token` (B, 1, D) or None, `patches` (B, N, D); registers are left out."""

    class_token: Tensor | None
    patches: Tensor
    grid: tuple[int, int]  # rows, columns; rows * columns = N


class TrunkOutput(NamedTuple):
    """What `run_trunk` returns: the layers asked for, in that order, and (B, P) if it was asked for."""

    layers: list[LayerTokens]
    pooled: Tensor | None = None


def synthesize_patch_tokens(pooled: Tensor, num_patches: int) -> Tensor:
    """Repeat one vector per image over a grid: (B, P) -> (B, num_patches, P).

    The fallback for a tower without spatial tokens. All patches of an image are equal, so a model behind it
    knows what the image shows but not where.
    """
    if pooled.ndim != 2:
        raise ValueError(f"pooled has shape {tuple(pooled.shape)}; expected (images, width).")
    if num_patches < 1:
        raise ValueError(f"num_patches is {num_patches}; expected at least 1.")
    return pooled.unsqueeze(1).expand(-1, num_patches, -1).contiguous()


def check_overrides(config_class: type[VisionEncoderConfig], overrides: dict[str, Any]) -> None:
    """Refuse keywords that are no field of the config; the nearest field is suggested."""
    known = [field.name for field in fields(config_class)]
    for name in overrides:
        if name not in known:
            near = get_close_matches(name, known, n=1)
            hint = f" Did you mean {near[0]!r}?" if near else ""
            raise TypeError(f"{config_class.__name__} has no field {name!r}.{hint}")


def check_divisible(image_hw: tuple[int, int], patch_size: int | Sequence[int] | None) -> None:
    """Refuse a new image size whose border would fall outside the patches."""
    if patch_size is None:
        return
    patch_hw = (patch_size, patch_size) if isinstance(patch_size, int) else tuple(patch_size)
    if any(side % patch for side, patch in zip(image_hw, patch_hw, strict=True)):
        near = [
            max(1, round(side / patch)) * patch
            for side, patch in zip(image_hw, patch_hw, strict=True)
        ]
        raise ValueError(
            f"Images of {image_hw[0]}x{image_hw[1]} pixels do not divide into patches of "
            f"{patch_hw[0]}x{patch_hw[1]}. The nearest size that does is {near[0]}x{near[1]}."
        )


def block_index(select_layer: int, num_layers: int) -> int:
    """Index of the block whose output LLaVA's `select_layer` means, in a trunk of `num_layers` blocks."""
    index = select_layer + num_layers if select_layer < 0 else select_layer - 1
    if not 0 <= index < num_layers:
        raise ValueError(
            f"select_layer is {select_layer}, but the trunk has {num_layers} layers: use {-num_layers} to -1 "
            f"(counted from the end), or 1 to {num_layers}. Layer 0, the embeddings, is not offered."
        )
    return index


class VisionEncoder(PreTrainedModel):
    """An image tower that gives patch tokens; built from its config alone, without disk or network."""

    config_class = VisionEncoderConfig
    base_model_prefix = "vision_encoder"
    main_input_name = "pixel_values"
    input_modalities = ["image"]
    _supports_sdpa = True  # each tower calls scaled_dot_product_attention, its own way

    # How many patches a tower without spatial tokens pretends to have; ViT-B/16's at 224 pixels.
    synthesized_grid: tuple[int, int] = (14, 14)

    @classmethod
    def _can_set_experts_implementation(cls) -> bool:
        # transformers asks every sub-model, and refuses the parent's setting if one of them says no.
        return True

    @property
    def num_layers(self) -> int:
        """How many layers `run_trunk` can give tokens of; 0 for a tower that only pools."""
        raise NotImplementedError

    @property
    def layers_are_alike(self) -> bool:
        """Whether the tokens of all layers have one shape; then the first is measured for those selected."""
        return False

    def run_trunk(
        self, pixel_values: Tensor, layers: Sequence[int], *, norm: bool, pooled: bool
    ) -> TrunkOutput:
        """Tokens after the blocks `layers` (0 is the first block), and the pooled vector if `pooled`.

        Blocks behind the last one needed do not run. `norm` applies the trunk's final norm to each layer.
        """
        raise NotImplementedError

    def build_image_processor(self) -> "BaseImageProcessor":
        """The tower's own preprocessing, from the config alone."""
        raise NotImplementedError

    # ---- what everyone reads ----

    @property
    def hidden_size(self) -> int:
        """D, the width of a patch token."""
        return self.config.hidden_size

    @property
    def num_patches(self) -> int:
        """N, the tokens that come out per image, the class token included where it is selected."""
        return self.config.num_patches

    @property
    def grid(self) -> tuple[int, int]:
        """(rows, columns) of the patches."""
        rows, columns = self.config.grid
        return rows, columns

    @property
    def image_size(self) -> int | list[int]:
        """Pixels, one side or [height, width]."""
        return self.config.image_size

    @property
    def image_processor(self) -> "BaseImageProcessor":
        """The preprocessing that belongs to these weights."""
        if getattr(self, "_image_processor", None) is None:
            self._image_processor: Any = self.build_image_processor()
        return self._image_processor

    @property
    def synthesized(self) -> bool:
        """Whether patch tokens are the pooled vector, repeated."""
        return self.num_layers == 0 or self.config.patch_tokens == "synthesized"

    # ---- forward ----

    def forward(self, pixel_values: Tensor, output_pooled: bool = False) -> VisionEncoderOutput:
        """Patch tokens (B, N, D) of normalised pixels (B, 3, H, W); the pooled vector too if `output_pooled`.

        Without `output_pooled`, the blocks behind the selected layer are not run.
        """
        self._check_pixels(pixel_values)
        trunk = self.run_trunk(
            pixel_values,
            [] if self.synthesized else self._block_indices(),
            norm=self.config.final_norm,
            pooled=output_pooled or self.synthesized,
        )
        tokens = self._select_tokens(trunk, self.grid)
        return VisionEncoderOutput(
            patch_tokens=tokens, pooled=trunk.pooled, synthesized=self.synthesized
        )

    def encode(self, images: Any, *, batch_size: int = 16, progress: bool = False) -> Tensor:
        """Patch tokens (B, N, D) of images, without gradients, on the encoder's device.

        Args:
            images: one image or a list: PIL, a path (DICOM and NIfTI included), an array or tensor (H, W),
                (H, W, C) or (C, H, W), uint8, uint16 or float in 0..1.
        """
        return encode_images(self, images, batch_size=batch_size, progress=progress)

    def save_pretrained(self, save_directory: str | os.PathLike, *args: Any, **kwargs: Any) -> None:
        """Write config, weights and the image processor into a folder."""
        super().save_pretrained(save_directory, *args, **kwargs)
        self.image_processor.save_pretrained(save_directory)

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: Any,
        *args: Any,
        image_size: int | Sequence[int] | None = None,
        device: torch.device | str | None = None,
        output_loading_info: bool = False,
        **kwargs: Any,
    ) -> Any:
        """Load an encoder that `save_pretrained` wrote; nothing may be missing or left over.

        Arguments are those of `PreTrainedModel.from_pretrained`, and `image_size` and `device`.
        """
        loaded: Any = super().from_pretrained(
            pretrained_model_name_or_path, *args, output_loading_info=True, **kwargs
        )
        encoder, info = loaded
        require_loaded(pretrained_model_name_or_path, info)
        if image_size is not None:
            encoder.set_image_size(image_size)
        encoder = encoder if device is None else encoder.to(device)
        return (encoder, info) if output_loading_info else encoder

    def log_tower(self) -> None:
        """Say in one INFO line which tower was loaded and what it gives."""
        logger.info(
            "tower %s@%s: %d patch tokens of width %d, %s",
            self.config.tower,
            (self.config.revision or "local")[:7],
            self.num_patches,
            self.hidden_size,
            "synthesized" if self.synthesized else "real",
        )

    def set_image_size(self, image_size: int | Sequence[int]) -> None:
        """Take another image size: positions are interpolated; grid, token count and processor follow."""
        config = self.config
        before, config.image_size = (
            config.image_hw,
            image_size if isinstance(image_size, int) else list(image_size),
        )
        if config.image_hw == before:
            return
        self.resize_trunk()
        self._image_processor = None
        with torch.device("meta"):
            type(self)(config)  # measures the new shapes into the config that both share

    def resize_trunk(self) -> None:
        """Make the trunk take images of the config's new `image_size`."""
        raise ValueError(f"{self._label} takes images of one size only.")

    # ---- construction ----

    def post_init(self) -> None:
        """Finish construction: Hugging Face's own part, then the measured shapes in the config."""
        super().post_init()
        if self.device.type == "meta":
            self._measure()
        else:
            # A twin without storage measures itself and writes into the config that both share.
            with torch.device("meta"):
                type(self)(self.config)

    def _measure(self) -> None:
        """Run the tower without storage and write width, grid and token count into the config."""
        _check_patch_tokens(self)
        config, (height, width) = self.config, self.config.image_hw
        pixels = torch.empty(1, 3, height, width, device="meta", dtype=self.dtype)
        indices = self._block_indices()
        if self.layers_are_alike:
            indices = [0] * len(indices)
        training = self.training
        self.eval()  # batch norm refuses a single image while training
        try:
            with torch.no_grad():
                trunk = self.run_trunk(
                    pixels, indices, norm=config.final_norm, pooled=self.synthesized
                )
        except (AssertionError, RuntimeError, NotImplementedError) as error:
            raise ValueError(
                f"{self._label} cannot take images of {height}x{width} pixels with "
                f"select_layer={config.select_layer}, final_norm={config.final_norm}: {error}"
            ) from error
        finally:
            self.train(training)
        grids = {layer.grid for layer in trunk.layers} or {self.synthesized_grid}
        if len(grids) > 1:
            raise ValueError(
                f"select_layer={config.select_layer} joins layers of different grids {sorted(grids)}; "
                "name layers of one grid."
            )
        config.grid = list(grids.pop())
        _, config.num_patches, config.hidden_size = self._select_tokens(trunk, self.grid).shape

    def _block_indices(self) -> list[int]:
        if self.num_layers == 0:
            return []
        return [block_index(layer, self.num_layers) for layer in self.config.layers]

    def _select_tokens(self, trunk: TrunkOutput, grid: tuple[int, int]) -> Tensor:
        """(B, N, D) of what the trunk gave, as the config selects."""
        if self.synthesized:
            assert trunk.pooled is not None
            return synthesize_patch_tokens(trunk.pooled, grid[0] * grid[1])
        selected = [_select(layer, self.config.select_feature) for layer in trunk.layers]
        return selected[0] if len(selected) == 1 else torch.cat(selected, dim=-1)

    @property
    def _label(self) -> str:
        return f"{type(self).__name__} ({self.config.tower or 'built from a config'})"

    def _check_pixels(self, pixel_values: Tensor) -> None:
        expected = (3, *self.config.image_hw)
        if pixel_values.ndim != 4 or tuple(pixel_values.shape[1:]) != expected:
            raise ValueError(
                f"pixel_values has shape {tuple(pixel_values.shape)}; expected (images, {expected[0]}, "
                f"{expected[1]}, {expected[2]}). Use encoder.image_processor(images, "
                "return_tensors='pt'), or load the tower with another image_size."
            )


def _select(layer: LayerTokens, select_feature: str) -> Tensor:
    """The tokens (B, N, D) that `select_feature` names."""
    class_token, patches, _ = layer
    if select_feature in ("patch", "default") or (select_feature == "full" and class_token is None):
        return patches
    if class_token is None:
        raise ValueError(
            f"select_feature is {select_feature!r}, but this trunk has no class token: use 'patch' or 'full'."
        )
    return class_token if select_feature == "cls" else torch.cat([class_token, patches], dim=1)


def _check_choice(name: str, value: str, choices: Sequence[str]) -> None:
    if value not in choices:
        raise ValueError(f"{name} is {value!r}; choose one of {', '.join(map(repr, choices))}.")


def _check_patch_tokens(encoder: VisionEncoder) -> None:
    """Refuse settings that the tower cannot keep, and say once what synthesis costs."""
    config = encoder.config
    if config.patch_tokens == "real" and encoder.num_layers == 0:
        raise ValueError(
            f"patch_tokens is 'real', but {encoder._label} only gives one pooled vector per image. "
            "Use patch_tokens='auto' or 'synthesized', or another tower."
        )
    if config.final_norm and not encoder.has_final_norm:
        raise ValueError(
            f"final_norm is True, but {encoder._label} has no norm that fits its hidden states."
        )
    if not encoder.synthesized:
        return
    if config.select_feature not in ("patch", "default", "full"):
        raise ValueError(
            f"select_feature is {config.select_feature!r}, but {encoder._label} gives synthesized tokens, "
            "without a class token. Use 'patch'."
        )
    logger.warning(
        "%s: patch tokens are synthesized (one pooled vector repeated over the grid), so they carry no "
        "spatial detail. patch_tokens='real' forbids this.",
        encoder._label,
    )
