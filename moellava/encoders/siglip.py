"""transformers' SigLIP vision tower as an encoder."""

from moellava.encoders._transformers import TransformersVisionConfig, TransformersVisionEncoder


class SiglipVisionConfig(TransformersVisionConfig):
    """A `SiglipVisionModel`; SigLIP 2's checkpoints of one fixed size are of this kind too."""

    model_type = "moellava_siglip_vision"
    default_tower_type = "siglip_vision_model"


class SiglipEncoder(TransformersVisionEncoder):
    """Patch tokens of a `SiglipVisionModel`; it has no class token."""

    config_class = SiglipVisionConfig
    tower_class = "SiglipVisionModel"
