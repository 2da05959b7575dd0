"""Medical vision-language models: an image encoder, a projector and a mixture-of-experts language model.

Importing moellava registers its classes with transformers' Auto classes, so that
`AutoModelForImageTextToText.from_pretrained(folder)` opens a saved model.
"""

from moellava.encoders import VisionEncoder, create_encoder
from moellava.model import (
    MoeLlavaConfig,
    MoeLlavaForConditionalGeneration,
    MoeLlavaModel,
    MoeLlavaProcessor,
)
from moellava.model.builder_enhanced import (
    CustomVisionConfig,
    LoadedModel,
    describe,
    load_pretrained_model,
    load_vision_encoder,
)
from moellava.model.checkpoint.difference import load_trainable, save_trainable
from moellava.model.checkpoint.projector_file import save_projector
from moellava.model.language_model import LlamaMoeConfig, LlamaMoeForCausalLM, LlamaMoeModel

__version__ = "0.1.0"

__all__ = [
    "CustomVisionConfig",
    "LlamaMoeConfig",
    "LlamaMoeForCausalLM",
    "LlamaMoeModel",
    "LoadedModel",
    "MoeLlavaConfig",
    "MoeLlavaForConditionalGeneration",
    "MoeLlavaModel",
    "MoeLlavaProcessor",
    "VisionEncoder",
    "create_encoder",
    "describe",
    "load_pretrained_model",
    "load_trainable",
    "load_vision_encoder",
    "save_projector",
    "save_trainable",
]
