"""The configuration of the joined model: image encoder, projector, language model."""

from typing import Any

from huggingface_hub.dataclasses import strict
from transformers import AutoConfig, PreTrainedConfig
from transformers.configuration_utils import SubConfigSpec

from moellava.model.projector import ProjectorShape, num_projected_tokens


@strict
class MoeLlavaConfig(PreTrainedConfig):
    """Configuration of `MoeLlavaForConditionalGeneration`.

    Args:
        vision_config: config of the image encoder, as an object or a dict with its `model_type`
            (default `biomedclip_vision`).
        text_config: config of the language model, `llama_moe` by default; any causal language model that
            AutoConfig knows makes a dense baseline.
        image_token_id: id of `<image>` in the tokenizer; each image stands in the prompt as
            `num_image_tokens` of them.
        projector_type: `mlpNx_gelu` (N linear layers, GELU between, as in LLaVA) or a name of
            `moellava.model.projector.PROJECTORS`.
        projector_options: of that type, such as `{"factor": 2}`; what is left out has its default.
        language_model, language_model_revision: where the language model's weights came from: a repo id (or a local
            folder's own name) and its commit. The tower's are `vision_config.tower` and `vision_config.revision`.
        projector_tower: which tower the projector was made for, `TowerIdentity` of
            `moellava.model.trained_projector` as a dict.
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
    language_model: str | None = None
    language_model_revision: str | None = None
    projector_tower: dict[str, Any] | None = None
    tie_word_embeddings: bool = False

    def __post_init__(self, **kwargs: Any) -> None:
        super().__post_init__(**kwargs)
        # Language models keep this flag in their own config; transformers ties weights by the outer one.
        self.projector_options = self.projector_options or {}
        self.tie_word_embeddings = self.tie_word_embeddings or self.text_config.tie_word_embeddings

    @property
    def projector_shape(self) -> ProjectorShape:
        """Widths and counts on both sides of the projector."""
        vision = self.vision_config
        return ProjectorShape(
            vision_width=vision.hidden_size,
            text_width=self.text_config.hidden_size,
            num_patches=vision.num_patches,
            grid=tuple(vision.grid),
        )

    @property
    def num_image_tokens(self) -> int:
        """Placeholders per image in a prompt: what the projector makes of the tower's patch tokens."""
        return num_projected_tokens(self.projector_type, self.projector_shape, self.projector_options)
