"""The contract of every image encoder: pixels in, patch tokens out.

    B images, H x W pixels, N patches on a grid, D width of a patch token, P width of a pooled
    vector

VisionEncoder                       the base class; a family adds `run_trunk` and `num_layers`
measure                             the shapes of a config's tokens, found without weights
check_divisible, block_index        image sizes and layers that a trunk can take
"""

import copy
import logging
import os
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.image_processing_utils import BaseImageProcessor
from typing_extensions import Self

from moellava.encoders.batches import encode_images
from moellava.encoders.configuration import (
    OptionValue,
    VisionEncoderConfig,
    image_height_width,
)
from moellava.encoders.outputs import (
    LayerTokens,
    Shapes,
    TrunkOutput,
    VisionEncoderOutput,
    synthesize_patch_tokens,
)
from moellava.images import Images
from moellava.storage.errors import reading
from moellava.storage.sources import Source, find_file, parse_source, split_hub_keywords
from moellava.storage.weights import require_loaded, require_own_files

T = TypeVar("T")

logger = logging.getLogger(__name__)

CONFIG_FILE = "config.json"
PROCESSOR_FILE = "preprocessor_config.json"
WEIGHT_FILES = ("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin")


def measure(encoder_class: type["VisionEncoder"], config: VisionEncoderConfig) -> Shapes:
    """The shapes that an encoder of this config gives, from a twin without storage.

    Raises:
        ValueError: the tower cannot take images of this size, or cannot give what the config
            selects.
    """
    with torch.device("meta"):
        twin = encoder_class(copy.deepcopy(config))  # a tower on meta measures itself
    return Shapes(twin.grid, twin.num_patches, twin.hidden_size)


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
    """Index of the block that LLaVA's `select_layer` means, in a trunk of `num_layers` blocks."""
    index = select_layer + num_layers if select_layer < 0 else select_layer - 1
    if not 0 <= index < num_layers:
        raise ValueError(
            f"select_layer is {select_layer}, but the trunk has {num_layers} layers: use "
            f"{-num_layers} to -1 (counted from the end), or 1 to {num_layers}. Layer 0, the "
            "embeddings, is not offered."
        )
    return index


class VisionEncoder(PreTrainedModel):
    """An image tower that gives patch tokens, built from its config alone: no disk, no network."""

    config: VisionEncoderConfig
    config_class = VisionEncoderConfig
    base_model_prefix = "vision_encoder"
    main_input_name = "pixel_values"
    input_modalities = ["image"]
    _supports_sdpa = True  # each tower calls scaled_dot_product_attention, its own way

    _image_processor: BaseImageProcessor | None = None

    # How many patches a tower without spatial tokens pretends to have; ViT-B/16's at 224 pixels.
    synthesized_grid: tuple[int, int] = (14, 14)

    @classmethod
    def _can_set_experts_implementation(cls) -> bool:
        # transformers asks every sub-model, and refuses the parent's setting if one of them says
        # no.
        return True

    @property
    def num_layers(self) -> int:
        """How many layers `run_trunk` can give tokens of; 0 for a tower that only pools."""
        raise NotImplementedError

    @property
    def has_final_norm(self) -> bool:
        """Whether the trunk has a last norm that fits its hidden states."""
        return False

    @property
    def layers_are_alike(self) -> bool:
        """Whether the tokens of all layers have one shape; if so, only the first is measured."""
        return False

    def run_trunk(
        self, pixel_values: Tensor, layers: Sequence[int], *, norm: bool, pooled: bool
    ) -> TrunkOutput:
        """Tokens after the blocks `layers` (0 is the first), and the pooled vector if `pooled`.

        Blocks behind the last one needed do not run. `norm` applies the trunk's final norm to each
        layer.
        """
        raise NotImplementedError

    def build_image_processor(self) -> BaseImageProcessor:
        """The tower's own preprocessing, from the config alone."""
        raise NotImplementedError

    # ---- what everyone reads ----

    @property
    def hidden_size(self) -> int:
        """D, the width of a patch token."""
        return _measured(self.config.hidden_size)

    @property
    def num_patches(self) -> int:
        """N, the tokens that come out per image, the class token included if it is selected."""
        return _measured(self.config.num_patches)

    @property
    def grid(self) -> tuple[int, int]:
        """(rows, columns) of the patches."""
        rows, columns = _measured(self.config.grid)
        return rows, columns

    @property
    def image_size(self) -> int | list[int]:
        """Pixels, one side or [height, width]."""
        size = self.config.image_size or self.config.trained_image_size
        return size if isinstance(size, int) else list(size)

    @property
    def image_processor(self) -> BaseImageProcessor:
        """The preprocessing that belongs to these weights."""
        if self._image_processor is None:
            self._image_processor = self.build_image_processor()
        return self._image_processor

    @property
    def synthesized(self) -> bool:
        """Whether patch tokens are the pooled vector, repeated."""
        return self.num_layers == 0 or self.config.patch_tokens == "synthesized"

    # ---- forward ----

    def forward(self, pixel_values: Tensor, output_pooled: bool = False) -> VisionEncoderOutput:
        """Patch tokens (B, N, D) of normalised pixels (B, 3, H, W).

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

    def encode(self, images: Images, *, batch_size: int = 16, progress: bool = False) -> Tensor:
        """Patch tokens (B, N, D) of images, without gradients, on the encoder's device.

        Args:
            images: one image or a list: PIL, a path (DICOM and NIfTI included), an array or tensor
                (H, W), (H, W, C) or (C, H, W), uint8, uint16 or float in 0..1.
        """
        return encode_images(self, images, batch_size=batch_size, progress=progress)

    def save_pretrained(
        self, save_directory: str | os.PathLike[str], *args: Any, **kwargs: Any
    ) -> None:
        """Write config, weights and the image processor into a folder."""
        super().save_pretrained(save_directory, *args, **kwargs)
        self.image_processor.save_pretrained(save_directory)

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | os.PathLike[str] | None,
        *args: object,
        image_size: int | Sequence[int] | None = None,
        device: torch.device | str | None = None,
        **kwargs: Any,
    ) -> Any:
        """Load an encoder that `save_pretrained` wrote, or a tower of the family's own library.

        Nothing may be missing or left over.

        Args:
            pretrained_model_name_or_path: see `moellava.storage.sources.parse_source`.
            **kwargs: `revision`, `cache_dir`, `local_files_only`, `token`; `dtype`; fields of the
                config. For a saved encoder also those of `PreTrainedModel.from_pretrained`.
        """
        place = pretrained_model_name_or_path
        if place is not None and not args:
            hub, options = split_hub_keywords(kwargs)
            source = parse_source(place, hub)
            if cls.is_foreign(source):
                return cls.load(source, image_size=image_size, device=device, **options)
            place = source.folder or source.repo_id
            require_own_files(source)
        wants_info = kwargs.pop("output_loading_info", False)
        with nullcontext() if place is None else reading(place, "a saved encoder"):
            loaded: Any = super().from_pretrained(place, *args, output_loading_info=True, **kwargs)
        encoder, info = loaded
        require_loaded(place, info)
        if image_size is not None:
            encoder.set_image_size(image_size)
        encoder = encoder if device is None else encoder.to(device)
        return (encoder, info) if wants_info else encoder

    @classmethod
    def is_foreign(cls, source: Source) -> bool:
        """Whether a source is something for `load`, not an encoder that `save_pretrained` wrote."""
        return False

    @classmethod
    def load(
        cls,
        source: Source,
        *,
        image_size: int | Sequence[int] | None = None,
        dtype: torch.dtype | str | None = None,
        device: torch.device | str | None = None,
        **options: OptionValue,
    ) -> Self:
        """Load a tower of the family's own library; a family that has one overrides this."""
        raise ValueError(
            f"{cls.__name__} cannot load {source.name}: save_pretrained did not write it."
        )

    @classmethod
    def tower_files(
        cls, source: Source, *, download: bool = False
    ) -> list[tuple[str, Path | None]]:
        """(name, path) of the files that would be loaded; None is not on this machine."""

        def find(name: str) -> Path | None:
            return find_file(source, name, download=download, required=False)

        weights = next((name for name in WEIGHT_FILES if find(name) is not None), WEIGHT_FILES[0])
        files = [(name, find(name)) for name in (CONFIG_FILE, PROCESSOR_FILE, weights)]
        # What a folder lacks is not missing from this machine: there is no more of it.
        return [(name, path) for name, path in files if path is not None or source.folder is None]

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
        """Take another image size: positions are interpolated, grid and processor follow."""
        config = self.config
        before, wanted = config.image_hw, image_height_width(image_size)
        config.image_size = image_size if isinstance(image_size, int) else list(wanted)
        if wanted == before:
            return
        self.resize_trunk()
        self._image_processor = None
        self._record_shapes(measure(type(self), config))

    def resize_trunk(self) -> None:
        """Make the trunk take images of the config's new `image_size`."""
        raise ValueError(f"{self._label} takes images of one size only.")

    # ---- construction ----

    def post_init(self) -> None:
        """Finish construction: Hugging Face's own part, then the measured shapes in the config."""
        super().post_init()  # type: ignore[no-untyped-call]
        is_on_meta = self.device.type == "meta"
        self._record_shapes(self._run_on_meta() if is_on_meta else measure(type(self), self.config))

    def _record_shapes(self, shapes: "Shapes") -> None:
        config = self.config
        config.grid = list(shapes.grid)
        config.num_patches = shapes.num_patches
        config.hidden_size = shapes.hidden_size

    def _run_on_meta(self) -> "Shapes":
        """Run this tower, which has no storage, on one image."""
        _check_patch_tokens(self)
        config, (height, width) = self.config, self.config.image_hw
        pixels = torch.empty(1, 3, height, width, device="meta", dtype=self.dtype)
        indices = self._block_indices()
        if self.layers_are_alike:
            indices = [0] * len(indices)
        training = self.training
        # Batch norm refuses a single image while training.
        self.eval()  # type: ignore[no-untyped-call]
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
                f"select_layer={config.select_layer} joins layers of different grids "
                f"{sorted(grids)}; name layers of one grid."
            )
        grid = grids.pop()
        _, num_patches, hidden_size = self._select_tokens(trunk, grid).shape
        return Shapes(grid, num_patches, hidden_size)

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
        height, width = self.config.image_hw
        if pixel_values.ndim != 4 or tuple(pixel_values.shape[1:]) != (3, height, width):
            raise ValueError(
                f"pixel_values has shape {tuple(pixel_values.shape)}; expected (images, 3, "
                f"{height}, {width}). Use encoder.image_processor(images, return_tensors='pt'), or "
                "load the tower with another image_size."
            )


def _measured(value: T | None) -> T:
    assert value is not None  # `post_init` has written it
    return value


def _select(layer: LayerTokens, select_feature: str) -> Tensor:
    """The tokens (B, N, D) that `select_feature` names."""
    class_token, patches, _ = layer
    if select_feature == "patch" or (select_feature == "full" and class_token is None):
        return patches
    if class_token is None:
        raise ValueError(
            f"select_feature is {select_feature!r}, but this trunk has no class token: use 'patch' "
            "or 'full'."
        )
    return class_token if select_feature == "cls" else torch.cat([class_token, patches], dim=1)


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
    if config.select_feature not in ("patch", "full"):
        raise ValueError(
            f"select_feature is {config.select_feature!r}, but {encoder._label} gives synthesized "
            "tokens, without a class token. Use 'patch'."
        )
    logger.warning(
        "%s: patch tokens are synthesized (one pooled vector repeated over the grid), so they "
        "carry no spatial detail. patch_tokens='real' forbids this.",
        encoder._label,
    )
