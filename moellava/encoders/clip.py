"""transformers' CLIP vision tower as an encoder."""

from moellava.encoders._transformers import TransformersVisionConfig, TransformersVisionEncoder


class ClipVisionConfig(TransformersVisionConfig):
    """A `CLIPVisionModel`; the default is that class's own default."""

    model_type = "moellava_clip_vision"
    default_tower_type = "clip_vision_model"


class ClipEncoder(TransformersVisionEncoder):
    """Patch tokens of a `CLIPVisionModel`, taken from its repo or from a whole CLIP's."""

    config_class = ClipVisionConfig
    tower_class = "CLIPVisionModel"
