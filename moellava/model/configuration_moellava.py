"""The configuration of the joined model: image encoder, projector, language model."""

from typing import Any

import torch
from huggingface_hub.dataclasses import strict
from transformers import AutoConfig, AutoModel, PreTrainedConfig
from transformers.configuration_utils import SubConfigSpec

from moellava.encoders._transformers import TransformersVisionConfig, plain_config
from moellava.encoders.configuration import VisionEncoderConfig
from moellava.encoders.factory import encoder_kinds
from moellava.model.projector import ProjectorShape, num_projected_tokens


@strict
class MoeLlavaConfig(PreTrainedConfig):
    """Configuration of `MoeLlavaForConditionalGeneration`.

    Args:
        vision_config: config of the image encoder, as an object or a dict with its `model_type`
            (default `biomedclip_vision`). A tower's config of transformers (`CLIPVisionConfig`,
            `SiglipVisionConfig`, `Dinov2Config`) becomes that of our encoder around it, with its
            defaults: layer -2, no class token.
        text_config: config of the language model, `llama_moe` by default; any causal language model
            that AutoConfig knows makes a dense baseline.
        image_token_id: id of `<image>` in the tokenizer; each view of an image stands in the prompt
            as `num_image_tokens` of them.
        projector_type: `mlpNx_gelu` (N linear layers, GELU between, as in LLaVA) or a name of
            `moellava.model.projector.PROJECTORS`.
        projector_options: of that type, such as `{"factor": 2}`; what is left out has its default.
        tiling: fields of `moellava.model.tiling.Tiling` that the model was built with; None is one
            view of each image. The processor, which has them too, is what acts on them.
        language_model, language_model_revision: where the language model's weights came from: a
            repo id (or a local folder's own name) and its commit. The tower's are
            `vision_config.tower` and `vision_config.revision`.
        projector_tower: which tower the projector was made for, `TowerIdentity` of
            `moellava.model.checkpoint.projector_file` as a dict.
    """

    model_type = "moellava"
    sub_configs_defaults = {
        "vision_config": SubConfigSpec(config_class=AutoConfig, model_type="biomedclip_vision"),
        "text_config": SubConfigSpec(config_class=AutoConfig, model_type="llama_moe"),
    }

    vision_config: Any = None  # a dict, a config or None; a config from then on
    text_config: Any = None
    image_token_id: int = 32000
    projector_type: str = "mlp2x_gelu"
    projector_options: dict[str, Any] | None = None
    tiling: dict[str, Any] | None = None
    language_model: str | None = None
    language_model_revision: str | None = None
    projector_tower: dict[str, Any] | None = None
    tie_word_embeddings: bool = False

    def __post_init__(self, **kwargs: Any) -> None:
        super().__post_init__(**kwargs)  # type: ignore[no-untyped-call]
        self.vision_config = _as_encoder_config(self.vision_config)
        self.projector_options = self.projector_options or {}
        # Language models keep this flag in their config; transformers reads the outer one.
        self.tie_word_embeddings = self.tie_word_embeddings or self.text_config.tie_word_embeddings

    def to_dict(self) -> dict[str, Any]:
        """As transformers', but without the places of the parts on this machine."""
        settings: dict[str, Any] = super().to_dict()
        _drop_places(settings)
        return settings

    @property
    def projector_shape(self) -> ProjectorShape:
        """Widths and counts on both sides of the projector."""
        vision = self.vision_config
        if vision.hidden_size is None:  # not yet built: encoders measure themselves
            with torch.device("meta"):
                AutoModel.from_config(vision, trust_remote_code=False)
        return ProjectorShape(
            vision_width=vision.hidden_size,
            text_width=self.text_config.hidden_size,
            num_patches=vision.num_patches,
            grid=tuple(vision.grid),
        )

    @property
    def num_image_tokens(self) -> int:
        """Placeholders per view of an image in a prompt: as many as the projector gives."""
        return num_projected_tokens(
            self.projector_type, self.projector_shape, self.projector_options
        )


def _drop_places(settings: dict[str, Any]) -> None:
    settings.pop("_name_or_path", None)
    for value in settings.values():
        if isinstance(value, dict):
            _drop_places(value)


def _as_encoder_config(config: PreTrainedConfig) -> VisionEncoderConfig:
    if isinstance(config, VisionEncoderConfig):
        return config
    own: Any = next(
        (kind for kind in encoder_kinds() if config.model_type in kind.model_types), None
    )
    config_class = own.encoder_class().config_class if own else None
    if config_class is None or not issubclass(config_class, TransformersVisionConfig):
        known = sorted({name for kind in encoder_kinds() for name in kind.model_types})
        raise ValueError(
            f"vision_config has model_type {config.model_type!r}, which no image encoder reads. "
            f"Known: {', '.join(known)}. moellava.encoders.factory.register_encoder adds one."
        )
    # A whole CLIP's or SigLIP's config holds that of its tower.
    tower_config = plain_config(getattr(config, "vision_config", config))
    wrapped: VisionEncoderConfig = config_class(tower_config=tower_config)
    return wrapped
