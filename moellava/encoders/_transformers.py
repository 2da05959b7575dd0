"""transformers' own vision towers as encoders: what CLIP, SigLIP and DINOv2 have in common."""

import json
import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, ClassVar, Protocol

import torch
import transformers
from huggingface_hub.dataclasses import strict
from torch import Tensor, nn
from transformers import AutoConfig, AutoImageProcessor, AutoModel
from transformers.image_processing_utils import BaseImageProcessor
from typing_extensions import Self

from moellava.encoders.base import CONFIG_FILE, VisionEncoder, check_divisible
from moellava.encoders.configuration import (
    OptionValue,
    VisionEncoderConfig,
    check_options,
    image_height_width,
)
from moellava.encoders.outputs import LayerTokens, TrunkOutput
from moellava.storage.errors import reading
from moellava.storage.limits import require_bounded
from moellava.storage.sources import (
    HubKeywords,
    JsonObject,
    Source,
    commit_of,
    find_file,
    read_json,
)
from moellava.storage.weights import require_fit, require_own_files

logger = logging.getLogger(__name__)


@strict
class TransformersVisionConfig(VisionEncoderConfig):
    """A tower of transformers: `tower_config` and `processor_config` are its own configs, as JSON.

    `tower_config["image_size"]` is the size the tower was trained at; `image_size` the size it
    takes now.
    """

    default_tower_type: ClassVar[str] = ""

    tower_config: JsonObject | None = None
    processor_config: JsonObject | None = None

    def __post_init__(self, **kwargs: Any) -> None:
        if self.tower_config is None:
            self.tower_config = plain_config(AutoConfig.for_model(self.default_tower_type))
        super().__post_init__(**kwargs)

    @property
    def trained_image_size(self) -> int | list[int]:
        """Pixels, one side or [height, width]."""
        trained: int | list[int] = (self.tower_config or {})["image_size"]
        return trained


class TransformersVisionEncoder(VisionEncoder):
    """A vision transformer of transformers with `embeddings`, blocks, and one last norm."""

    config: TransformersVisionConfig
    config_class: type[TransformersVisionConfig]
    tower: Any  # a vision model of transformers: each has other attributes
    supports_gradient_checkpointing = True
    _supports_flash_attn = True
    # The transformers class that reads the tower out of a repo of the family; AutoModel's own where
    # None.
    tower_class: ClassVar[str | None] = None
    # Whether the tower interpolates positions by `interpolate_pos_encoding`, rather than whenever
    # it has to.
    interpolates_when_told: ClassVar[bool] = True

    def __init__(self, config: TransformersVisionConfig):
        super().__init__(config)
        tower_config = AutoConfig.for_model(**(config.tower_config or {}))
        attention = config._attn_implementation
        options = {"attn_implementation": attention} if attention else {}
        self.tower = AutoModel.from_config(tower_config, trust_remote_code=False, **options)
        self.post_init()

    @property
    def _blocks(self) -> nn.ModuleList:
        encoder = getattr(self.tower, "encoder", self.tower)
        blocks: nn.ModuleList = encoder.layers if hasattr(encoder, "layers") else encoder.layer
        return blocks

    @property
    def _norm(self) -> nn.Module:
        name = "post_layernorm" if hasattr(self.tower, "post_layernorm") else "layernorm"
        norm: nn.Module = getattr(self.tower, name)
        return norm

    @property
    def num_layers(self) -> int:
        """Blocks of the transformer."""
        return len(self._blocks)

    @property
    def has_final_norm(self) -> bool:
        """True: each of these families has one."""
        return True

    @property
    def _patch_hw(self) -> tuple[int, int]:
        patch = self.tower.config.patch_size
        return (patch, patch) if isinstance(patch, int) else tuple(patch)

    @property
    def _rows_columns(self) -> tuple[int, int]:
        (height, width), (patch_height, patch_width) = self.config.image_hw, self._patch_hw
        return height // patch_height, width // patch_width

    @property
    def _trained_hw(self) -> tuple[int, int]:
        return image_height_width(self.config.trained_image_size)

    @property
    def _position_options(self) -> dict[str, bool]:
        """At the trained size nothing is interpolated, which keeps the tower's own bits."""
        is_resized = self.config.image_hw != self._trained_hw
        return (
            {"interpolate_pos_encoding": True} if is_resized and self.interpolates_when_told else {}
        )

    @property
    def layers_are_alike(self) -> bool:
        """True: these towers are plain transformers."""
        return True

    def tower_inputs(self, pixel_values: Tensor) -> dict[str, Tensor | bool]:
        """What the tower's own `forward` takes."""
        return {"pixel_values": pixel_values, **self._position_options}

    def embed(self, pixel_values: Tensor) -> Tensor:
        """What the first block takes, (B, T, D)."""
        hidden: Tensor = self.tower.embeddings(pixel_values, **self._position_options)
        return hidden

    def run_trunk(
        self, pixel_values: Tensor, layers: Sequence[int], *, norm: bool, pooled: bool
    ) -> TrunkOutput:
        """See `VisionEncoder.run_trunk`; the pooled vector (`pooler_output`) costs its own pass."""
        vector = self.tower(**self.tower_inputs(pixel_values)).pooler_output if pooled else None
        if not layers:
            return TrunkOutput([], vector)
        hidden = self.embed(pixel_values)
        if hasattr(self.tower, "pre_layrnorm"):  # CLIP; so spelt in its checkpoints
            hidden = self.tower.pre_layrnorm(hidden)
        outputs = {}
        for index, block in enumerate(self._blocks[: max(layers) + 1]):
            hidden = block(hidden, None)
            if index in layers:
                outputs[index] = self._norm(hidden) if norm else hidden
        rows, columns = self._rows_columns
        embeddings = self.tower.embeddings
        has_class_token = hasattr(embeddings, "cls_token") or hasattr(embeddings, "class_embedding")
        tokens = [
            LayerTokens(
                outputs[layer][:, :1] if has_class_token else None,
                outputs[layer][:, -rows * columns :],  # registers stand before the patches
                (rows, columns),
            )
            for layer in layers
        ]
        return TrunkOutput(tokens, vector)

    def resize_trunk(self) -> None:
        """Nothing to do: positions are interpolated in the forward pass."""
        check_divisible(self.config.image_hw, self._patch_hw)

    def build_image_processor(self) -> BaseImageProcessor:
        """The tower's own image processor, at the encoder's image size."""
        settings = dict(self.config.processor_config or {})
        if not settings:
            raise ValueError(
                f"{self._label} has no processor_config; load it from a repo that has one."
            )
        height, width = self.config.image_hw
        if (height, width) != self._trained_hw:
            size, crop = settings.get("size") or {}, settings.get("crop_size")
            if "shortest_edge" in size:
                # Some towers resize to a little more than they crop (DINOv2: 256, 224): keep the
                # proportion.
                margin = size["shortest_edge"] / min(crop.values()) if crop else 1
                settings["size"] = {"shortest_edge": round(max(height, width) * margin)}
            else:
                settings["size"] = {"height": height, "width": width}
            if crop:
                settings["crop_size"] = {"height": height, "width": width}
        return _processor_class(settings.pop("image_processor_type", None))(**settings)

    @classmethod
    def is_foreign(cls, source: Source) -> bool:
        """Whether the source is a repo or folder of transformers; a whole CLIP will do."""
        config_file = find_file(source, CONFIG_FILE, download=True, required=False)
        assert config_file is not None  # download=True finds it or raises
        return read_json(config_file).get("model_type") != cls.config_class.model_type

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
        """Load the vision tower of a transformers repo; its text tower is not built."""
        check_options(cls.config_class, options)
        name = source.folder or source.repo_id
        hub: HubKeywords = source.hub.keywords if source.folder is None else {}
        tower_class: Any = getattr(transformers, cls.tower_class) if cls.tower_class else AutoModel
        require_own_files(source)
        config_file = find_file(source, CONFIG_FILE, download=True, required=False)
        if config_file is not None:
            read_json(config_file)  # its sizes are within the limits
        with reading(str(name), "a tower of transformers"), _no_load_report():
            tower, info = tower_class.from_pretrained(
                name,
                dtype=dtype or "auto",
                output_loading_info=True,
                trust_remote_code=False,
                **hub,
            )
        # Unexpected keys are the text tower's.
        require_fit(source.name, missing=info["missing_keys"], mismatched=info["mismatched_keys"])
        with reading(str(name), "an image processor"):
            processor = AutoImageProcessor.from_pretrained(name, trust_remote_code=False, **hub)
        require_bounded(f"the image processor of {name}", plain_config(processor))
        chosen: JsonObject = dict(options)
        config = cls.config_class(
            tower_config=plain_config(tower.config),
            processor_config=plain_config(processor),
            tower=source.name,
            revision=commit_of(config_file) if config_file else None,
            **chosen,
        )
        with torch.device("meta"):
            encoder = cls(config)
        encoder.tower = tower
        encoder.eval()  # type: ignore[no-untyped-call]
        if image_size is not None:
            encoder.set_image_size(image_size)
        encoder.log_tower()
        return encoder if device is None else encoder.to(device)  # type: ignore[arg-type]  # mistyped


def _processor_class(name: object) -> type[BaseImageProcessor]:
    """An image processor of transformers: a config may not name anything else to be called."""
    found = getattr(transformers, name, None) if isinstance(name, str) else None
    if not (isinstance(found, type) and issubclass(found, BaseImageProcessor)):
        raise ValueError(
            f"image_processor_type is {name!r}, which is not an image processor of transformers. "
            "Load the tower anew from a repo that has a preprocessor_config.json."
        )
    return found


class _HasJson(Protocol):
    def to_json_string(self) -> str: ...


class _NoLoadReport(logging.Filter):
    def filter(self, record: logging.LogRecord) -> bool:
        return "LOAD REPORT" not in record.getMessage()


@contextmanager
def _no_load_report() -> Iterator[None]:
    """Keep transformers from logging a page of text weights; the image tower's are checked."""
    noisy, quiet = logging.getLogger("transformers.modeling_utils"), _NoLoadReport()
    names = [noisy, logging.getLogger("transformers.utils.loading_report")]
    for name in names:
        name.addFilter(quiet)
    try:
        yield
    finally:
        for name in names:
            name.removeFilter(quiet)


def plain_config(config: _HasJson) -> JsonObject:
    """A config or image processor as plain JSON, without what belongs to one machine or loading."""
    settings: JsonObject = json.loads(config.to_json_string())
    for name in ("_name_or_path", "dtype", "transformers_version", "architectures"):
        settings.pop(name, None)
    return settings
