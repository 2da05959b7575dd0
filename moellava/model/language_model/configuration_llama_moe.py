"""Which layers of a Llama are sparse, how many experts they hold and how tokens are routed."""

from collections.abc import Callable, Collection
from typing import Any, ClassVar

from huggingface_hub.dataclasses import strict
from transformers import LlamaConfig, PreTrainedConfig

from moellava.messages import unknown_name
from moellava.storage.limits import require_within

# MoE-LLaVA's names (arXiv 2401.15947, `moe_mode`); the argument is the number of decoder layers.
LAYER_CHOICES: dict[str, Callable[[int], range]] = {
    "sparse": lambda num_layers: range(0, num_layers, 2),
    "dense": lambda num_layers: range(num_layers),
    "first_half": lambda num_layers: range(num_layers // 2),
    "second_half": lambda num_layers: range(num_layers // 2, num_layers),
}


# No `from __future__ import annotations` here: @strict checks types only if they are real objects.
@strict
class LlamaMoeConfig(LlamaConfig):
    """A `LlamaConfig` whose chosen layers route each token to `num_experts_per_tok` of their MLPs.

    Args:
        moe_layers: layer indices, or `"sparse"` (every second layer, from layer 0), `"dense"`
            (all), `"first_half"` or `"second_half"`. Kept as given; see `moe_layer_indices`.
        num_experts: E, experts per sparse layer, at least 1.
        num_experts_per_tok: k, experts that each token goes to, 1..E.
        norm_topk_prob: divide the k chosen probabilities by their sum (Mixtral, MoE-LLaVA). False
            weighs each chosen expert with its raw probability (Switch, Med-MoE).
        moe_intermediate_size: width of one expert; `None` means `intermediate_size`.
        meta_expert: add one MLP of width `intermediate_size` that every token passes through, at
            weight 1 (Med-MoE, arXiv 2404.10237: O = sum_i G_i E_i + E_meta).
        router_bias: give the router a bias, one number per expert (Med-MoE).
        router_frozen: the router gets no gradient (Med-MoE's third stage).
        expert_labels: what each expert serves, such as a modality; from the router's file.
        output_router_logits: return `router_logits` and `aux_loss` even if not asked to.
        router_aux_loss_coef: weight of the load-balancing loss, which is 1.0 when balanced, in the
            training loss.
        router_z_loss_coef: weight of the router z-loss (ST-MoE, arXiv 2202.08906) in the training
            loss.

    Raises:
        ValueError: for a layer choice, expert count or coefficient that no model can be built of.
    """

    model_type = "llama_moe"
    base_model_tp_plan: ClassVar[dict[str, str]] = {
        **LlamaConfig.base_model_tp_plan,
        "layers.*.mlp.experts.gate_up_proj": "packed_colwise",
        "layers.*.mlp.experts.down_proj": "rowwise",
        "layers.*.mlp.experts": "moe_tp_experts",
        "layers.*.mlp.meta_expert.gate_proj": "colwise",
        "layers.*.mlp.meta_expert.up_proj": "colwise",
        "layers.*.mlp.meta_expert.down_proj": "rowwise",
    }
    base_model_ep_plan: ClassVar[dict[str, str]] = {  # type: ignore[assignment]
        "layers.*.mlp.experts.gate_up_proj": "grouped_gemm",
        "layers.*.mlp.experts.down_proj": "grouped_gemm",
        "layers.*.mlp.experts": "ep_dispatch_experts",
    }

    moe_layers: str | list[int] = "sparse"
    num_experts: int = 4
    num_experts_per_tok: int = 2
    norm_topk_prob: bool = True
    moe_intermediate_size: int | None = None
    meta_expert: bool = False
    router_bias: bool = False
    router_frozen: bool = False
    expert_labels: list[str] | None = None
    output_router_logits: bool = False
    router_aux_loss_coef: float = 0.01
    router_z_loss_coef: float = 0.0

    def __post_init__(self, **kwargs: Any) -> None:
        if self.moe_intermediate_size is None:
            self.moe_intermediate_size = self.intermediate_size
        super().__post_init__(**kwargs)  # type: ignore[no-untyped-call]
        self.validate_mixture()

    def validate_mixture(self) -> None:
        """Raise `ValueError` if the routing fields contradict each other or the layer count."""
        # Before the layers are listed: a file may say 10^7 of them.
        require_within("layers", self.num_hidden_layers, "num_hidden_layers")
        require_within("experts", self.num_experts, "num_experts")
        self.moe_layer_indices  # noqa: B018 - resolving is the check
        if self.num_experts < 1:
            raise ValueError(
                f"num_experts is {self.num_experts}, but a sparse layer needs at least 1 expert."
            )
        if not 1 <= self.num_experts_per_tok <= self.num_experts:
            raise ValueError(
                f"num_experts_per_tok is {self.num_experts_per_tok}, but must be between 1 and "
                f"num_experts={self.num_experts}. Lower it, or raise num_experts."
            )
        if self.moe_intermediate_size is not None and self.moe_intermediate_size < 1:
            raise ValueError(
                f"moe_intermediate_size is {self.moe_intermediate_size}, but must be at least 1. "
                f"Leave it out for intermediate_size={self.intermediate_size}."
            )
        for name in ("router_aux_loss_coef", "router_z_loss_coef"):
            if not 0 <= getattr(self, name) < float("inf"):
                raise ValueError(
                    f"{name} is {getattr(self, name)}, but must be 0 (off) or a positive number."
                )
        if self.expert_labels is not None and len(self.expert_labels) != self.num_experts:
            raise ValueError(
                f"expert_labels has {len(self.expert_labels)} labels, but there are "
                f"num_experts={self.num_experts} experts. Give one label for each."
            )
        if self.mlp_bias:
            raise ValueError(
                "mlp_bias is True, but experts have no biases. "
                "Use a checkpoint with mlp_bias=False."
            )

    @property
    def expert_width(self) -> int:
        """I, the width of one expert."""
        return self.moe_intermediate_size or self.intermediate_size

    @property
    def moe_layer_indices(self) -> list[int]:
        """The sparse layers, ascending; every other layer keeps the dense MLP."""
        return resolve_moe_layers(self.moe_layers, self.num_hidden_layers)

    def is_sparse(self, layer_idx: int) -> bool:
        """Whether layer `layer_idx` (0-based) is a mixture."""
        return layer_idx in self.moe_layer_indices

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        """As transformers', but a config of another architecture is an error.

        Raises:
            ValueError: for another `model_type`; its checkpoint has no experts in our layout, so
                they would be random.
        """
        found = config_dict.get("model_type", cls.model_type)
        if found != cls.model_type:
            raise ValueError(
                f"This is a {found!r} config, but a {cls.model_type!r} one is needed: its "
                "checkpoint has no experts in our layout. Turn a dense Llama into a mixture with "
                "moellava.model.language_model.upcycle(source), and read a published mixture with "
                "moellava.model.language_model.import_mixture(source)."
            )
        return super().from_dict(config_dict, **kwargs)


def resolve_moe_layers(moe_layers: str | Collection[int], num_layers: int) -> list[int]:
    """The layer indices that a choice names, ascending.

    Raises:
        ValueError: for an unknown word, or for indices that are out of range, repeated or empty.
    """
    if isinstance(moe_layers, str):
        if moe_layers not in LAYER_CHOICES:
            error = unknown_name("moe_layers", moe_layers, LAYER_CHOICES)
            raise ValueError(f"{error} Or give a list of layer indices.")
        indices = list(LAYER_CHOICES[moe_layers](num_layers))
    else:
        indices = sorted(moe_layers)
    outside = [index for index in indices if not 0 <= index < num_layers]
    if outside:
        raise ValueError(
            f"moe_layers names {outside}, but the model has layers 0 to {num_layers - 1}."
        )
    repeated = sorted({index for index in indices if indices.count(index) > 1})
    if repeated:
        raise ValueError(f"moe_layers names {repeated} more than once. Give each layer index once.")
    if not indices:
        raise ValueError(
            f"moe_layers={moe_layers!r} chooses none of the {num_layers} layers. "
            "Name at least one layer, or use a plain LlamaForCausalLM."
        )
    return indices


def is_mixture_config(config: PreTrainedConfig) -> bool:
    """Whether a language model's config describes a mixture of experts."""
    return hasattr(config, "num_experts")
