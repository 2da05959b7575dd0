"""Image encoders: pixels in, patch tokens out. open_clip and timm load when a tower is built.

create_encoder, detect_encoder_type, register_encoder       a name in, a ready encoder out
encoder_options, option                                     what may be chosen, and one more choice
VisionEncoder, VisionEncoderConfig, VisionEncoderOutput     the contract
BiomedClipEncoder                                           any open_clip checkpoint
synthesize_patch_tokens                                     the fallback for towers that only pool
parse_source, resolve                                       where a tower comes from
"""

from transformers import AutoConfig, AutoImageProcessor, AutoModel

from moellava.encoders.base import VisionEncoder
from moellava.encoders.biomedclip import BiomedClipEncoder
from moellava.encoders.clip import ClipEncoder, ClipVisionConfig
from moellava.encoders.configuration import OptionValue, VisionEncoderConfig, option
from moellava.encoders.dinov2 import Dinov2Encoder, Dinov2VisionConfig
from moellava.encoders.factory import (
    create_encoder,
    detect_encoder_type,
    encoder_options,
    register_encoder,
)
from moellava.encoders.open_clip.configuration import (
    DEFAULT_BIOMEDCLIP,
    BiomedClipVisionConfig,
)
from moellava.encoders.open_clip.files import resolve
from moellava.encoders.open_clip.image_processor import BiomedClipImageProcessor
from moellava.encoders.outputs import (
    LayerTokens,
    TrunkOutput,
    VisionEncoderOutput,
    synthesize_patch_tokens,
)
from moellava.encoders.siglip import SiglipEncoder, SiglipVisionConfig
from moellava.encoders.siglip2 import Siglip2Encoder, Siglip2VisionConfig
from moellava.storage.sources import parse_source

for _config_class, _encoder_class in (
    (BiomedClipVisionConfig, BiomedClipEncoder),
    (ClipVisionConfig, ClipEncoder),
    (SiglipVisionConfig, SiglipEncoder),
    (Siglip2VisionConfig, Siglip2Encoder),
    (Dinov2VisionConfig, Dinov2Encoder),
):
    AutoConfig.register(_config_class.model_type, _config_class, exist_ok=True)
    AutoModel.register(_config_class, _encoder_class, exist_ok=True)
# Under both names: there is no other, and without the second each load would warn that torchvision
# is missing.
AutoImageProcessor.register(
    BiomedClipVisionConfig,
    image_processor_classes={
        "pil": BiomedClipImageProcessor,
        "torchvision": BiomedClipImageProcessor,
    },
    exist_ok=True,
)

__all__ = [
    "DEFAULT_BIOMEDCLIP",
    "BiomedClipEncoder",
    "BiomedClipImageProcessor",
    "BiomedClipVisionConfig",
    "ClipEncoder",
    "ClipVisionConfig",
    "Dinov2Encoder",
    "Dinov2VisionConfig",
    "LayerTokens",
    "OptionValue",
    "Siglip2Encoder",
    "Siglip2VisionConfig",
    "SiglipEncoder",
    "SiglipVisionConfig",
    "TrunkOutput",
    "VisionEncoder",
    "VisionEncoderConfig",
    "VisionEncoderOutput",
    "create_encoder",
    "detect_encoder_type",
    "encoder_options",
    "option",
    "parse_source",
    "register_encoder",
    "resolve",
    "synthesize_patch_tokens",
]
