"""The config of an open_clip image tower; BiomedCLIP's is the default."""

from typing import Any

from huggingface_hub.dataclasses import strict

from moellava.encoders.configuration import VisionEncoderConfig, image_height_width
from moellava.storage.sources import JsonObject

# The tower that is loaded if none is named, and what its open_clip_config.json says.
DEFAULT_BIOMEDCLIP = "microsoft/BiomedCLIP-PubMedBERT_256-vit_base_patch16_224"
BIOMEDCLIP_VISION_CFG = {
    "timm_model_name": "vit_base_patch16_224",
    "timm_model_pretrained": False,
    "timm_pool": "",
    "timm_proj": "linear",
    "image_size": 224,
}


@strict
class BiomedClipVisionConfig(VisionEncoderConfig):
    """An open_clip image tower, its settings under open_clip's own names.

    The default is BiomedCLIP. `vision_cfg["image_size"]` is the size the tower was trained at;
    `image_size` the size it takes now.
    """

    model_type = "biomedclip_vision"

    vision_cfg: JsonObject | None = None
    embed_dim: int = 512
    quick_gelu: bool = False
    preprocess_cfg: JsonObject | None = None
    text_cfg: JsonObject | None = None  # None: no text tower
    text_model_config: JsonObject | None = None  # of a Hugging Face text model
    has_logit_bias: bool = False

    def __post_init__(self, **kwargs: Any) -> None:
        if self.vision_cfg is None:
            self.vision_cfg = dict(BIOMEDCLIP_VISION_CFG)
        self.preprocess_cfg = dict(self.preprocess_cfg or {})
        super().__post_init__(**kwargs)

    @property
    def trained_image_size(self) -> int | list[int]:
        """Pixels, one side or [height, width]."""
        trained: int | list[int] = (self.vision_cfg or {}).get("image_size", 224)
        return trained

    @property
    def trained_hw(self) -> tuple[int, int]:
        """(height, width) that the weights were trained at."""
        return image_height_width(self.trained_image_size)
