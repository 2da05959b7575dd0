"""Patch tokens and text → answer. Registers the classes with transformers' Auto classes."""

from transformers import AutoConfig, AutoModel, AutoModelForImageTextToText, AutoProcessor

from moellava.model.configuration_moellava import MoeLlavaConfig
from moellava.model.modeling_moellava import MoeLlavaForConditionalGeneration, MoeLlavaModel
from moellava.model.processing_moellava import MoeLlavaProcessor
from moellava.model.quantization import MoellavaQuantizationConfig

AutoConfig.register(MoeLlavaConfig.model_type, MoeLlavaConfig, exist_ok=True)
AutoModel.register(MoeLlavaConfig, MoeLlavaModel, exist_ok=True)
AutoModelForImageTextToText.register(
    MoeLlavaConfig, MoeLlavaForConditionalGeneration, exist_ok=True
)
AutoProcessor.register(MoeLlavaConfig, MoeLlavaProcessor, exist_ok=True)

__all__ = [
    "MoeLlavaConfig",
    "MoeLlavaForConditionalGeneration",
    "MoeLlavaModel",
    "MoeLlavaProcessor",
    "MoellavaQuantizationConfig",
]
