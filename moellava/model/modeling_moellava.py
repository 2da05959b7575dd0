"""Pixels and token ids → logits: image encoder, projector and language model as one model.

Letters: B prompts, T positions, I images in the batch, N image embeddings per image, D_t text
width, V vocabulary.
"""

import os
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModel, GenerationMixin, PreTrainedModel
from transformers.cache_utils import Cache
from transformers.modeling_outputs import (
    BaseModelOutputWithPooling,
    MultimodalMoeBaseModelOutputWithPast,
    MultimodalMoeCausalLMOutputWithPast,
)
from transformers.utils.deprecation import deprecate_kwarg
from transformers.utils.generic import can_return_tuple

from moellava.encoders import VisionEncoder
from moellava.model.configuration_moellava import MoeLlavaConfig
from moellava.model.language_model import has_router_penalty, lm_outputs
from moellava.model.projector import build_projector
from moellava.model.publish.model_card import push_to_hub
from moellava.model.publish.remote_code import carry_remote_code
from moellava.model.tiling import Tiling, merge_unpadded
from moellava.settings import from_mapping
from moellava.storage.weights import require_fit

# Beginnings of the weights' names.
TOWER_PREFIX = "model.vision_tower."
PROJECTOR_PREFIX = "model.multi_modal_projector."
_MISMATCH = "Image features and image tokens do not match"


def joined_name(name: str) -> str:
    """A weight of a language model's `ForCausalLM`, by the name that it has in the joined model."""
    return f"model.language_{name}" if name.startswith("model.") else name


class MoeLlavaPreTrainedModel(PreTrainedModel):
    config: MoeLlavaConfig
    config_class = MoeLlavaConfig
    base_model_prefix = "model"
    input_modalities = ["image", "text"]
    supports_gradient_checkpointing = True
    _no_split_modules = ["LlamaMoeDecoderLayer", "LlamaDecoderLayer", "BiomedClipEncoder"]
    _skip_keys_device_placement = ["cache"]
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    _can_compile_fullgraph = True

    @classmethod
    def _can_set_experts_implementation(cls) -> bool:
        # transformers looks for the experts' decorator in this file; it is in language_model/.
        return True

    @classmethod
    def from_pretrained(cls, *args: Any, output_loading_info: bool = False, **kwargs: Any) -> Any:
        """As transformers', but a missing weight is an error: it would be drawn at random.

        Raises:
            ValueError: naming the missing weights.
        """
        loaded: Any = super().from_pretrained(*args, output_loading_info=True, **kwargs)
        model, info = loaded
        require_fit((args and args[0]) or "the state dict", missing=info["missing_keys"])
        return (model, info) if output_loading_info else model

    def save_pretrained(
        self, save_directory: str | os.PathLike[str], *args: Any, **kwargs: Any
    ) -> None:
        """As transformers'; code that came with a checkpoint goes along."""
        super().save_pretrained(save_directory, *args, **kwargs)
        carry_remote_code(save_directory)

    def activation_checkpointing_enable(
        self,
        activation_checkpointing_kwargs: dict[str, Any] | None = None,
        *args: Any,
        **kwargs: Any,
    ) -> None:
        """As transformers', but not reentrant for a mixture with router losses.

        Raises:
            ValueError: it runs the layers without gradients first and records the router's logits
                there, so that the router's losses would train nothing.
        """
        is_reentrant = (activation_checkpointing_kwargs or {}).get("use_reentrant", False)
        if is_reentrant and has_router_penalty(self.config.text_config):
            raise ValueError(
                "use_reentrant=True loses the gradient of the router's losses. Leave it out, or "
                "set router_aux_loss_coef and router_z_loss_coef of the text config to 0."
            )
        super().activation_checkpointing_enable(activation_checkpointing_kwargs, *args, **kwargs)


class MoeLlavaModel(MoeLlavaPreTrainedModel):
    """Image encoder, projector and language model without the output head."""

    def __init__(self, config: MoeLlavaConfig):
        super().__init__(config)
        self.vision_tower: VisionEncoder = AutoModel.from_config(
            config.vision_config, trust_remote_code=False
        )
        self.multi_modal_projector = build_projector(
            config.projector_type, config.projector_shape, config.projector_options
        )
        self.language_model = AutoModel.from_config(config.text_config, trust_remote_code=False)
        self.tiling = (
            None
            if config.tiling is None
            else from_mapping(Tiling, config.tiling, kind="key of tiling")
        )
        if self.tiling is not None and self.tiling.merge == "spatial_unpad":
            # Ends each row of patches; no initial value, since only checkpoints have it.
            self.image_newline = nn.Parameter(torch.zeros(config.text_config.hidden_size))
        self.post_init()  # type: ignore[no-untyped-call]

    def get_vision_tower(self) -> VisionEncoder:
        return self.vision_tower

    @can_return_tuple  # type: ignore[untyped-decorator]
    def get_image_features(
        self, pixel_values: Tensor, image_sizes: Tensor | None = None, **kwargs: Any
    ) -> BaseModelOutputWithPooling:
        """Encode and project images.

        Args:
            pixel_values: (V, 3, H, W), as the processor returns them; any float dtype. V is the
                number of images, or with tiling that of their views.
            image_sizes: (I, 2), height and width of the images in pixels; needed by a model that
                merges the views of an image (`merge` of `moellava.model.tiling.Tiling`).

        Returns:
            `last_hidden_state`: patch tokens (V, N_patches, D_vision); `pooler_output`: a list with
            the embeddings (N, D_t) of each view, or of each image if views are merged; the form
            that `generate` and vLLM ask for.
        """
        patch_tokens = self.vision_tower(pixel_values.to(self.vision_tower.dtype)).patch_tokens
        return self._project(patch_tokens, image_sizes)

    def _project(
        self, patch_tokens: Tensor, image_sizes: Tensor | None
    ) -> BaseModelOutputWithPooling:
        # Contiguous: vLLM's linear layers on a CPU take nothing else.
        patch_tokens = patch_tokens.contiguous()
        image_embeds: Any  # a list, which transformers declares a tensor
        if self.tiling is None or self.tiling.merge == "flat":
            image_embeds = list(self.multi_modal_projector(patch_tokens))  # (N, D_t)
        else:
            image_embeds = self._merged(patch_tokens, image_sizes)
        return BaseModelOutputWithPooling(
            last_hidden_state=patch_tokens, pooler_output=image_embeds
        )

    def _merged(self, patch_tokens: Tensor, image_sizes: Tensor | None) -> list[Tensor]:
        """The embeddings of each image, of the patch tokens of its views."""
        assert self.tiling is not None
        if image_sizes is None:
            raise ValueError(
                f"The model merges the tiles of an image (merge={self.tiling.merge!r}) and needs "
                "image_sizes. Pass all that MoeLlavaProcessor returns."
            )
        sizes = [(width, height) for height, width in image_sizes.tolist()]
        tile = self.config.vision_config.image_hw
        grids = [self.tiling.choose_grid(*size, tile) for size in sizes]
        counts = [self.tiling.num_views(grid) for grid in grids]
        if sum(counts) != len(patch_tokens):
            raise ValueError(
                f"image_sizes of {len(sizes)} images make {sum(counts)} views, but "
                f"{len(patch_tokens)} views are given. Pass all that MoeLlavaProcessor returns."
            )
        views: tuple[Tensor, ...]
        if self.tiling.merge == "joint":
            views = patch_tokens.split(counts)
            return [self.multi_modal_projector(own.flatten(0, 1)[None])[0] for own in views]
        views = self.multi_modal_projector(patch_tokens).split(counts)
        return [
            merge_unpadded(own, size, grid, self.image_newline)
            for own, size, grid in zip(views, sizes, grids, strict=True)
        ]

    @deprecate_kwarg("past_key_values", "5.40.0", new_name="cache")  # type: ignore[untyped-decorator]
    @can_return_tuple  # type: ignore[untyped-decorator]
    def forward(
        self,
        input_ids: Tensor | None = None,
        pixel_values: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        cache: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        mm_encoder_outputs: dict[str, BaseModelOutputWithPooling] | None = None,
        patch_tokens: Tensor | None = None,
        image_sizes: Tensor | None = None,
        **kwargs: Any,
    ) -> MultimodalMoeBaseModelOutputWithPast:
        """Put the images' embeddings into the text's and run the language model.

        Args:
            input_ids: (B, T); each image is `config.num_image_tokens` ids `config.image_token_id`.
            pixel_values: (V, 3, H, W), the views of the images in the order of their placeholders.
            inputs_embeds: (B, T, D_t), in place of `input_ids`.
            mm_encoder_outputs: `{"image": get_image_features(...)}`, in place of `pixel_values`.
            patch_tokens: (V, N_patches, D_vision), in place of `pixel_values`, as the frozen tower
                gave them before.
            image_sizes: (I, 2), see `get_image_features`.
            **kwargs: passed on to the language model.

        Returns:
            `last_hidden_state` (B, T, D_t), `cache`, `router_logits`, `image_outputs`, ...

        Raises:
            ValueError: if the placeholders of an image are not as many as its embeddings.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("Give exactly one of input_ids and inputs_embeds.")
        image_outputs: Any = (mm_encoder_outputs or {}).get("image")
        if sum(given is not None for given in (image_outputs, pixel_values, patch_tokens)) > 1:
            raise ValueError(
                "Give one of pixel_values, patch_tokens and mm_encoder_outputs['image']."
            )
        # TRL cuts none out of a batch's for some of its rows.
        if pixel_values is not None and len(pixel_values):
            image_outputs = self.get_image_features(pixel_values, image_sizes, return_dict=True)
        if patch_tokens is not None:
            projector_dtype = next(self.multi_modal_projector.parameters(), patch_tokens).dtype
            image_outputs = self._project(patch_tokens.to(projector_dtype), image_sizes)

        if input_ids is not None and image_outputs is not None:
            self._check_ids(input_ids)
        if inputs_embeds is None:
            inputs_embeds = self.get_input_embeddings()(input_ids)  # (B, T, D_t)
        if image_outputs is not None:
            is_image = self._find_image_tokens(input_ids, inputs_embeds)  # (B, T)
            inputs_embeds = place_image_embeds(inputs_embeds, image_outputs.pooler_output, is_image)

        outputs = self.language_model(
            attention_mask=attention_mask,
            position_ids=position_ids,
            cache=cache,
            inputs_embeds=inputs_embeds,
            **kwargs,
        )
        return MultimodalMoeBaseModelOutputWithPast(**outputs, image_outputs=image_outputs)

    def _check_ids(self, input_ids: Tensor) -> None:
        if not torch.compiler.is_compiling() and bool((input_ids < 0).any()):
            raise ValueError(
                f"input_ids hold {int(input_ids.min())}, as LLaVA's own scripts mark an image. "
                f"Here an image is {self.config.num_image_tokens} tokens of id "
                f"{self.config.image_token_id}: let MoeLlavaProcessor write them, "
                "processor(text=..., images=...)."
            )

    def _find_image_tokens(self, input_ids: Tensor | None, inputs_embeds: Tensor) -> Tensor:
        """Whether a position is a placeholder, (B, T) bool; without ids, by its embedding."""
        if input_ids is not None:
            return input_ids == self.config.image_token_id
        placeholder = torch.tensor(self.config.image_token_id, device=inputs_embeds.device)
        placeholder_embeds: Tensor = self.get_input_embeddings()(placeholder)
        return (inputs_embeds == placeholder_embeds).all(-1)


class MoeLlavaForConditionalGeneration(MoeLlavaPreTrainedModel, GenerationMixin):
    """The model that answers questions about images; `load_pretrained_model` builds one."""

    _tied_weights_keys = {"lm_head.weight": "model.language_model.embed_tokens.weight"}
    _tp_plan = {"lm_head": "colwise_gather_output"}
    # Where this process found the parts: for save_trainable, never saved.
    built_from: dict[str, str] | None = None

    def __init__(self, config: MoeLlavaConfig):
        super().__init__(config)
        self.model: MoeLlavaModel = MoeLlavaModel(config)
        self.lm_head = nn.Linear(
            config.text_config.hidden_size, config.text_config.vocab_size, bias=False
        )
        self.post_init()  # type: ignore[no-untyped-call]

    def get_image_features(
        self, pixel_values: Tensor, image_sizes: Tensor | None = None, **kwargs: Any
    ) -> BaseModelOutputWithPooling:
        features: BaseModelOutputWithPooling = self.model.get_image_features(
            pixel_values, image_sizes, **kwargs
        )
        return features

    def get_model(self) -> MoeLlavaModel:
        """The model without its head, as LLaVA's code calls it."""
        return self.model

    def get_vision_tower(self) -> VisionEncoder:
        """The image encoder, as LLaVA's code calls it."""
        return self.model.vision_tower

    def push_to_hub(self, repo_id: str, **options: Any) -> str:  # type: ignore[override]
        """Upload the model with a card that describes it.

        `LoadedModel.push_to_hub` uploads the processor too. Options are those of
        `moellava.model.publish.model_card.push_to_hub`.
        """
        return push_to_hub(self, repo_id, **options)

    @deprecate_kwarg("past_key_values", "5.40.0", new_name="cache")  # type: ignore[untyped-decorator]
    @can_return_tuple  # type: ignore[untyped-decorator]
    def forward(
        self,
        input_ids: Tensor | None = None,
        pixel_values: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        cache: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        output_router_logits: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        mm_encoder_outputs: dict[str, BaseModelOutputWithPooling] | None = None,
        patch_tokens: Tensor | None = None,
        image_sizes: Tensor | None = None,
        **kwargs: Any,
    ) -> MultimodalMoeCausalLMOutputWithPast:
        """Predict the next token at each position.

        Args:
            input_ids: (B, T); each image is `config.num_image_tokens` ids `config.image_token_id`.
            pixel_values: (V, 3, H, W), the views of the images in the order of their placeholders.
            labels: (B, T); -100 at positions without a loss.
            output_router_logits: also return `router_logits` and `aux_loss`; default: what the text
                config says. In training with `labels`, the router's losses are part of `loss`
                either way.
            patch_tokens: (V, N_patches, D_vision), in place of `pixel_values`, as the frozen tower
                gave them before.
            image_sizes: (I, 2), see `get_image_features`.

        Returns:
            `logits` (B, T, V), `loss`, `aux_loss`, `router_logits` (one (B*T, E) per sparse layer),
            `cache`, ...

        Raises:
            ValueError: if the placeholders of an image are not as many as its embeddings.
        """
        decode = partial(
            self.model,
            input_ids=input_ids,
            pixel_values=pixel_values,
            position_ids=position_ids,
            cache=cache,
            inputs_embeds=inputs_embeds,
            mm_encoder_outputs=mm_encoder_outputs,
            patch_tokens=patch_tokens,
            image_sizes=image_sizes,
        )
        fields, outputs = lm_outputs(
            self,
            self.config.text_config,
            decode,
            attention_mask=attention_mask,
            labels=labels,
            output_router_logits=output_router_logits,
            logits_to_keep=logits_to_keep,
            **kwargs,
        )
        return MultimodalMoeCausalLMOutputWithPast(**fields, image_outputs=outputs.image_outputs)  # type: ignore[arg-type]  # transformers annotates a tuple of one


def place_image_embeds(
    inputs_embeds: Tensor, image_embeds: list[Tensor], is_image: Tensor
) -> Tensor:
    """Put image embeddings in the places of the placeholders, in order.

    Args:
        inputs_embeds: (B, T, D_t).
        image_embeds: one (N, D_t) tensor per image or view, in the order of the placeholders, row
            after row.
        is_image: (B, T) bool.

    Returns:
        (B, T, D_t), in the dtype and on the device of `inputs_embeds`.

    Raises:
        ValueError: if the placeholders of an image are not as many as its embeddings. Totals are
            not enough: two wrong runs that cancel out would let one image bleed into another's
            prompt.
    """
    if not torch.compiler.is_compiling():
        _check_image_runs(is_image, [len(embeds) for embeds in image_embeds])
    flat = torch.cat(image_embeds).to(inputs_embeds.device, inputs_embeds.dtype)  # (I*N, D_t)
    return inputs_embeds.masked_scatter(is_image.unsqueeze(-1), flat)


def _check_image_runs(is_image: Tensor, lengths: Sequence[int]) -> None:
    """Compare each run of adjacent placeholders with the whole images that it has to hold.

    Args:
        is_image: (B, T) bool.
        lengths: the embeddings of each image.
    """
    image = 0  # images that have their placeholders
    for run in _run_lengths(is_image):
        rest = run
        while image < len(lengths) and rest >= lengths[image]:
            rest -= lengths[image]
            image += 1
        if rest == 0:
            continue
        # Less than half an image more: the run's last image has tokens too many. Otherwise the next
        # one has too few.
        is_too_long = rest < run and 0 < rest < lengths[image - 1] / 2
        blamed = image if is_too_long else image + 1
        if blamed <= len(lengths):
            num_features = lengths[blamed - 1]
            raise ValueError(
                f"{_MISMATCH}: {num_features * is_too_long + rest} tokens, {num_features} "
                f"features in image {blamed} of the batch. Let MoeLlavaProcessor write the "
                "placeholders, and do not cut them."
            )
        raise _wrong_totals(is_image, lengths, "Pass one image for each placeholder.")
    if image < len(lengths):
        raise _wrong_totals(is_image, lengths, "Put one <image> into the prompts for each image.")


def _wrong_totals(is_image: Tensor, lengths: Sequence[int], remedy: str) -> ValueError:
    return ValueError(
        f"{_MISMATCH}: {int(is_image.sum())} tokens in the prompts, {sum(lengths)} features of "
        f"{len(lengths)} images. {remedy}"
    )


def _run_lengths(is_image: Tensor) -> list[int]:
    """Lengths of the runs of True, row after row; a run ends with its row."""
    padded = nn.functional.pad(is_image.int(), (1, 1))  # (B, T + 2)
    change = padded.diff(dim=1)
    starts, ends = (change == 1).nonzero(), (change == -1).nonzero()
    lengths: list[int] = (ends[:, 1] - starts[:, 1]).tolist()
    return lengths
