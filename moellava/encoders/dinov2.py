"""transformers' DINOv2 as an encoder, with registers or without."""

from moellava.encoders._transformers import TransformersVisionConfig, TransformersVisionEncoder


class Dinov2VisionConfig(TransformersVisionConfig):
    """A `Dinov2Model` or `Dinov2WithRegistersModel`."""

    model_type = "moellava_dinov2_vision"
    default_tower_type = "dinov2"


class Dinov2Encoder(TransformersVisionEncoder):
    """Patch tokens of a DINOv2 tower; register tokens are never features."""

    config_class = Dinov2VisionConfig
    interpolates_when_told = False
