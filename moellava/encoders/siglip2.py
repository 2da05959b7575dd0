"""transformers' SigLIP 2 of any resolution ("NaFlex") as an encoder."""

import math

import torch
from torch import Tensor
from transformers import SiglipImageProcessor
from transformers.image_processing_utils import BaseImageProcessor

from moellava.encoders._transformers import TransformersVisionConfig, TransformersVisionEncoder


class Siglip2VisionConfig(TransformersVisionConfig):
    """A `Siglip2VisionModel`; SigLIP 2's checkpoints of one fixed size are SigLIP's."""

    model_type = "moellava_siglip2_vision"
    default_tower_type = "siglip2_vision_model"

    @property
    def trained_image_size(self) -> int:
        """Side in pixels of the square that has the tower's `num_patches`."""
        tower_config = self.tower_config or {}
        patch_size: int = tower_config["patch_size"]
        return math.isqrt(tower_config["num_patches"]) * patch_size


class Siglip2Encoder(TransformersVisionEncoder):
    """Patch tokens of a `Siglip2VisionModel`; it has no class token.

    Every image of an encoder has one size here, `image_size`, since a language model behind it
    counts on one number of tokens. So images are stretched to it, as SigLIP's are, where NaFlex
    would keep their proportions: choose a non-square `image_size` for images that are not square.
    """

    config_class = Siglip2VisionConfig
    tower_class = "Siglip2VisionModel"

    def tower_inputs(self, pixel_values: Tensor) -> dict[str, Tensor | bool]:
        """Patches as rows, none of them padding."""
        patches = self._patchify(pixel_values)
        is_patch = patches.new_ones(patches.shape[:2], dtype=torch.long)
        shapes = self._spatial_shapes.expand(len(patches), 2)
        return {"pixel_values": patches, "pixel_attention_mask": is_patch, "spatial_shapes": shapes}

    def embed(self, pixel_values: Tensor) -> Tensor:
        """What the first block takes, (B, N, D)."""
        hidden: Tensor = self.tower.embeddings(self._patchify(pixel_values), self._spatial_shapes)
        return hidden

    def build_image_processor(self) -> BaseImageProcessor:
        """SigLIP's image processor with this tower's mean, deviation and resampling."""
        settings = self.config.processor_config or {}
        if not settings:
            return super().build_image_processor()  # which says what is missing
        kept = {
            key: settings[key] for key in ("image_mean", "image_std", "resample") if key in settings
        }
        height, width = self.config.image_hw
        return SiglipImageProcessor(size={"height": height, "width": width}, **kept)

    def _patchify(self, pixel_values: Tensor) -> Tensor:
        """(B, C, H, W) to (B, N, P*P*C), row by row, the channel running fastest."""
        rows, columns = self._rows_columns
        batch_size, channels = pixel_values.shape[:2]
        patch_height, patch_width = self._patch_hw
        cut = pixel_values.reshape(batch_size, channels, rows, patch_height, columns, patch_width)
        return cut.permute(0, 2, 4, 3, 5, 1).reshape(batch_size, rows * columns, -1)

    @property
    def _spatial_shapes(self) -> Tensor:
        return torch.tensor(
            [self._rows_columns], device="cpu"
        )  # the tower looks at the values, even on meta
