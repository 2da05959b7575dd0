"""transformers' Llama with a sparse mixture of experts in the chosen layers: token ids to logits.

B batch, T positions, H hidden width, V vocabulary, E experts.

Public names: `LlamaMoeForCausalLM`, `LlamaMoeModel`, `LlamaMoePreTrainedModel`.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from transformers import initialization as init
from transformers.cache_utils import Cache
from transformers.generation import GenerationMixin
from transformers.modeling_outputs import MoeCausalLMOutputWithPast, MoeModelOutputWithPast
from transformers.modeling_utils import PreTrainedModel, slice_logits_to_keep
from transformers.models.llama.modeling_llama import (
    LlamaAttention,
    LlamaDecoderLayer,
    LlamaForCausalLM,
    LlamaModel,
    LlamaPreTrainedModel,
    LlamaRMSNorm,
    LlamaRotaryEmbedding,
)
from transformers.utils.deprecation import deprecate_kwarg
from transformers.utils.generic import can_return_tuple
from transformers.utils.output_capturing import OutputRecorder

from moellava.model.language_model.configuration_llama_moe import LlamaMoeConfig
from moellava.model.language_model.moe import (
    DEFAULT_EXPERTS_IMPLEMENTATION,
    LlamaMoeExperts,
    LlamaMoeRouter,
    LlamaMoeSparseBlock,
    add_router_losses,
    has_router_penalty,
)


class LlamaMoeDecoderLayer(LlamaDecoderLayer):
    def __init__(self, config: LlamaMoeConfig, layer_idx: int) -> None:
        super().__init__(config, layer_idx)
        if config.is_sparse(layer_idx):
            self.mlp: nn.Module = LlamaMoeSparseBlock(config)  # type: ignore[assignment]  # called like LlamaMLP


class LlamaMoePreTrainedModel(LlamaPreTrainedModel):
    """What both models share: initialisation, recorded outputs, and loading that never invents an expert."""

    config: LlamaMoeConfig
    config_class = LlamaMoeConfig
    _no_split_modules = ["LlamaMoeDecoderLayer"]
    _keep_in_fp32_modules_strict = {"mlp.gate.weight", "mlp.gate.bias"}
    _can_record_outputs = {
        "router_logits": OutputRecorder(LlamaMoeRouter, index=0),
        "hidden_states": LlamaDecoderLayer,
        "attentions": LlamaAttention,
    }

    @classmethod
    def _can_set_experts_implementation(cls) -> bool:
        # transformers looks for the decorator's text in this module, but the experts live in moe.py
        return True

    def get_correct_experts_implementation(self, requested_experts: str | None) -> str:
        return super().get_correct_experts_implementation(
            requested_experts or DEFAULT_EXPERTS_IMPLEMENTATION
        )

    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, LlamaMoeExperts):
            init.normal_(module.gate_up_proj, mean=0.0, std=self.config.initializer_range)
            init.normal_(module.down_proj, mean=0.0, std=self.config.initializer_range)
        elif isinstance(module, LlamaMoeRouter):
            init.normal_(module.weight, mean=0.0, std=self.config.initializer_range)
            if module.bias is not None:
                init.zeros_(module.bias)

    @classmethod
    def from_pretrained(cls, *args: Any, output_loading_info: bool = False, **kwargs: Any) -> Any:
        """As transformers', but weights that the checkpoint lacks or has in another shape are an error.

        Raises:
            ValueError: naming the missing or misshapen weights; transformers would draw random ones.
        """
        kwargs["ignore_mismatched_sizes"] = True  # our error names them, transformers' does not
        loaded: Any = super().from_pretrained(*args, output_loading_info=True, **kwargs)
        model, info = loaded
        require_complete(info)
        for module in model.modules():
            if isinstance(module, LlamaMoeRouter):  # loading has made new parameters, all trainable
                module.requires_grad_(not module.frozen)
        return (model, info) if output_loading_info else model


class LlamaMoeModel(LlamaMoePreTrainedModel, LlamaModel):
    """The decoder without a head; `router_logits` hold one (B*T, E) float32 tensor per sparse layer."""

    def __init__(self, config: LlamaMoeConfig) -> None:
        PreTrainedModel.__init__(self, config)  # LlamaModel's would build the dense layers first
        self.padding_idx = config.pad_token_id
        self.vocab_size = config.vocab_size
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size, self.padding_idx)
        self.layers = nn.ModuleList(
            [
                LlamaMoeDecoderLayer(config, layer_idx)
                for layer_idx in range(config.num_hidden_layers)
            ]
        )
        self.norm = LlamaRMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.rotary_emb = LlamaRotaryEmbedding(config=config)
        self.gradient_checkpointing = False
        self.post_init()

    @can_return_tuple
    def forward(self, *args: Any, **kwargs: Any) -> MoeModelOutputWithPast:
        """As `LlamaModel`; only the output class differs, since capture has put the router logits into it."""
        return MoeModelOutputWithPast(**super().forward(*args, **kwargs))


class LlamaMoeForCausalLM(LlamaMoePreTrainedModel, LlamaForCausalLM, GenerationMixin):
    """The decoder with its language-model head."""

    def __init__(self, config: LlamaMoeConfig) -> None:
        PreTrainedModel.__init__(self, config)
        self.model = LlamaMoeModel(config)
        self.vocab_size = config.vocab_size
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    @deprecate_kwarg("past_key_values", "5.40.0", new_name="cache")
    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        cache: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        output_router_logits: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        **kwargs: Any,
    ) -> MoeCausalLMOutputWithPast:
        """Logits (B, T, V), and with `labels` (B, T; -100 is left out) the loss.

        In training the loss contains `router_aux_loss_coef` times the load-balancing loss and `router_z_loss_coef`
        times the z-loss; in evaluation it is the language-model loss alone. `aux_loss`, the load-balancing loss
        before its coefficient, and `router_logits` are returned with `output_router_logits`, and `aux_loss` in training
        too. Padding is known from a 2-D `attention_mask` only.
        """
        if output_router_logits is None:
            output_router_logits = self.config.output_router_logits
        is_penalised = self.training and labels is not None and has_router_penalty(self.config)
        outputs = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            cache=cache,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            output_router_logits=output_router_logits or is_penalised,
            **kwargs,
        )
        logits = self.lm_head(
            slice_logits_to_keep(outputs.last_hidden_state, logits_to_keep)
        )  # (B, T, V)

        loss: Tensor | None = None
        if labels is not None:
            loss = self.loss_function(
                logits=logits, labels=labels, vocab_size=self.config.vocab_size, **kwargs
            )
        loss, aux_loss = add_router_losses(
            self.config,
            loss,
            outputs.router_logits,
            attention_mask,
            is_penalised=is_penalised,
            labels=labels,
            num_items_in_batch=kwargs.get("num_items_in_batch"),
        )
        return MoeCausalLMOutputWithPast(
            loss=loss,
            aux_loss=aux_loss,
            logits=logits,
            cache=outputs.cache,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
            router_logits=outputs.router_logits if output_router_logits else None,
        )


def require_complete(loading_info: dict[str, Any]) -> None:
    """Raise `ValueError` unless every weight of the model was in the checkpoint, in its shape.

    Args:
        loading_info: what `from_pretrained(..., output_loading_info=True)` returns beside the model.
    """
    _require_none(loading_info, ("missing", "mismatched"))


def require_exact(loading_info: dict[str, Any]) -> None:
    """As `require_complete`, and a weight that the model has no place for is an error too."""
    _require_none(loading_info, ("missing", "mismatched", "unexpected"))


def _require_none(loading_info: dict[str, Any], kinds: tuple[str, ...]) -> None:
    found = {kind: sorted(str(key) for key in loading_info[f"{kind}_keys"]) for kind in kinds}
    if any(found.values()):
        text = "; ".join(
            f"{len(keys)} {kind}, such as {', '.join(keys[:3])}"
            for kind, keys in found.items()
            if keys
        )
        raise ValueError(
            f"The checkpoint does not fit LlamaMoe: {text}. Nothing is filled in at random: turn a dense Llama into a "
            "mixture with moellava.model.language_model.upcycle(source), and load a mixture with the config it was "
            "saved with."
        )
