"""transformers' Llama with a sparse mixture of experts in the chosen layers: token ids to logits.

B batch, T positions, H hidden width, V vocabulary, E experts.
"""

from collections.abc import Collection, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import initialization as init
from transformers.cache_utils import Cache
from transformers.generation.utils import GenerationMixin
from transformers.modeling_outputs import MoeCausalLMOutputWithPast, MoeModelOutputWithPast
from transformers.modeling_utils import PreTrainedModel
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
    lm_outputs,
)
from moellava.storage.weights import require_fit, require_loaded


class LlamaMoeDecoderLayer(LlamaDecoderLayer):
    def __init__(self, config: LlamaMoeConfig, layer_idx: int) -> None:
        super().__init__(config, layer_idx)
        if config.is_sparse(layer_idx):
            # called like LlamaMLP
            self.mlp: nn.Module = LlamaMoeSparseBlock(config)  # type: ignore[assignment]


class LlamaMoePreTrainedModel(LlamaPreTrainedModel):
    """What both models share: initialisation, recorded outputs, loading without random weights."""

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
        # transformers looks for the decorator's text in this module, but the experts are in moe.py
        return True

    def get_correct_experts_implementation(self, requested_experts: str | None) -> str:
        return super().get_correct_experts_implementation(
            requested_experts or DEFAULT_EXPERTS_IMPLEMENTATION
        )

    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)  # type: ignore[no-untyped-call]
        if isinstance(module, LlamaMoeExperts):
            init.normal_(module.gate_up_proj, mean=0.0, std=self.config.initializer_range)
            init.normal_(module.down_proj, mean=0.0, std=self.config.initializer_range)
        elif isinstance(module, LlamaMoeRouter):
            init.normal_(module.weight, mean=0.0, std=self.config.initializer_range)
            if module.bias is not None:
                init.zeros_(module.bias)

    @classmethod
    def from_pretrained(cls, *args: Any, output_loading_info: bool = False, **kwargs: Any) -> Any:
        """As transformers', but every weight must be in the checkpoint, in its shape.

        Raises:
            ValueError: naming missing or misshapen weights; transformers would draw random ones.
        """
        kwargs["ignore_mismatched_sizes"] = True  # our error names them, transformers' does not
        loaded: Any = super().from_pretrained(*args, output_loading_info=True, **kwargs)
        model, info = loaded
        _require_complete((args and args[0]) or "the state dict", info)
        for module in model.modules():
            if isinstance(module, LlamaMoeRouter):  # loading makes new parameters, all trainable
                module.requires_grad_(not module.frozen)
        return (model, info) if output_loading_info else model


class LlamaMoeModel(LlamaMoePreTrainedModel, LlamaModel):
    """The decoder without a head; `router_logits` has one (B*T, E) float32 per sparse layer."""

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
        self.post_init()  # type: ignore[no-untyped-call]

    @deprecate_kwarg("past_key_values", "5.40.0", new_name="cache")  # type: ignore[untyped-decorator]
    @can_return_tuple  # type: ignore[untyped-decorator]
    def forward(  # spelled out: vLLM looks for names of arguments
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        cache: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        **kwargs: Any,
    ) -> MoeModelOutputWithPast:
        """As `LlamaModel`, but the output class has a place for the recorded router logits."""
        outputs = super().forward(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            cache=cache,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            **kwargs,
        )
        return MoeModelOutputWithPast(**outputs)


class LlamaMoeForCausalLM(LlamaMoePreTrainedModel, LlamaForCausalLM, GenerationMixin):
    """The decoder with its language-model head."""

    def __init__(self, config: LlamaMoeConfig) -> None:
        PreTrainedModel.__init__(self, config)
        self.model = LlamaMoeModel(config)
        self.vocab_size = config.vocab_size
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()  # type: ignore[no-untyped-call]

    @deprecate_kwarg("past_key_values", "5.40.0", new_name="cache")  # type: ignore[untyped-decorator]
    @can_return_tuple  # type: ignore[untyped-decorator]
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

        In training the loss contains `router_aux_loss_coef` times the load-balancing loss and
        `router_z_loss_coef` times the z-loss; in evaluation it is the language-model loss alone.
        `aux_loss`, the load-balancing loss before its coefficient, and `router_logits` are returned
        with `output_router_logits`, and `aux_loss` in training too. Padding is known from a 2-D
        `attention_mask` only.
        """
        decode = partial(
            self.model,
            input_ids=input_ids,
            position_ids=position_ids,
            cache=cache,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
        )
        fields, _ = lm_outputs(
            self,
            self.config,
            decode,
            attention_mask=attention_mask,
            labels=labels,
            output_router_logits=output_router_logits,
            logits_to_keep=logits_to_keep,
            **kwargs,
        )
        return MoeCausalLMOutputWithPast(**fields)  # type: ignore[arg-type]  # tuple[Tensor] there


def with_weights(
    where: str,
    config: LlamaMoeConfig,
    state_dict: dict[str, Tensor],
    *,
    dtype: torch.dtype,
    device: torch.device | str | None,
) -> LlamaMoeForCausalLM:
    """The model of a config with exactly these weights, in evaluation mode.

    Args:
        where: what the weights are, for the message.
        device: where the model goes; None leaves it on the CPU.

    Raises:
        ValueError: naming weights that are missing, unexpected or misshapen.
    """
    model, info = LlamaMoeForCausalLM.from_pretrained(
        None, config=config, state_dict=state_dict, dtype=dtype, output_loading_info=True
    )
    require_loaded(where, info)
    assert isinstance(model, LlamaMoeForCausalLM)
    if device is not None:
        model.to(device)  # type: ignore[arg-type]  # transformers' decorator hides its signature
    return model


def _require_complete(where: object, info: Mapping[str, Collection[object]]) -> None:
    missing, mismatched = info["missing_keys"], info["mismatched_keys"]
    try:
        require_fit(where, missing=missing, mismatched=mismatched)
    except ValueError as error:
        raise ValueError(
            f"{error} Nothing is filled in at random: turn a dense Llama into a mixture with "
            "moellava.model.language_model.upcycle(source), and load a mixture with the config "
            "that it was saved with."
        ) from None
