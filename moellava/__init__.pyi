# The public names and where they are defined: `__init__.py` reads this file, and so do type
# checkers.
from . import data, encoders, eval, explain, images, model, train
from .data import check_rows, read_rows, register_format
from .encoders import VisionEncoder, create_encoder, detect_encoder_type, register_encoder
from .images import load_image
from .model import (
    MoeLlavaConfig,
    MoeLlavaForConditionalGeneration,
    MoeLlavaModel,
    MoeLlavaProcessor,
)
from .model.builder.request import CustomVisionConfig
from .model.builder_enhanced import load_pretrained_model, load_vision_encoder
from .model.checkpoint.difference import load_trainable, save_trainable
from .model.checkpoint.projector_file import read_projector, save_projector
from .model.conversation import Conversation
from .model.describe import describe
from .model.language_model import LlamaMoeConfig, LlamaMoeForCausalLM, LlamaMoeModel
from .model.loaded_model import LoadedModel
from .model.projector import register_projector
from .train import load_recipe

__all__ = [
    "Conversation",
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
    "check_rows",
    "create_encoder",
    "data",
    "describe",
    "detect_encoder_type",
    "encoders",
    "eval",
    "explain",
    "images",
    "load_image",
    "load_pretrained_model",
    "load_recipe",
    "load_trainable",
    "load_vision_encoder",
    "model",
    "read_projector",
    "read_rows",
    "register_encoder",
    "register_format",
    "register_projector",
    "save_projector",
    "save_trainable",
    "train",
]

__version__: str
