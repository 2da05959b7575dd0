"""The sparse block: a token's hidden state goes to k of E experts, whose outputs are summed.

B batch, T positions, H hidden width, I expert width, E experts, k experts per token, N = B*T
tokens.

LlamaMoeSparseBlock, LlamaMoeRouter, LlamaMoeExperts   the modules
eager_experts_forward, fastest_experts_forward         how experts are computed
expert_load, load_balancing_loss, router_z_loss        what the router is measured and trained by
lm_outputs                                             the end of both causal models' `forward`
"""

from collections.abc import Callable, Sequence
from typing import Any, Protocol, TypedDict, TypeVar, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedConfig
from transformers.activations import ACT2FN
from transformers.cache_utils import Cache
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS, use_experts_implementation
from transformers.modeling_utils import slice_logits_to_keep
from transformers.models.llama.modeling_llama import LlamaMLP
from transformers.utils.generic import maybe_autocast

from moellava.model.language_model.configuration_llama_moe import LlamaMoeConfig, is_mixture_config

DEFAULT_EXPERTS_IMPLEMENTATION = "fastest"  # what `experts_implementation=None` means here


class LlamaMoeSparseBlock(nn.Module):
    """Stands where `LlamaMLP` stood: same call, same return, (B, T, H) to (B, T, H).

    y = sum_{i in top k} w_i E_i(x), plus E_meta(x) with `meta_expert` (Med-MoE, arXiv 2404.10237,
    eq. 3). No token is dropped and no noise is added, so a token's output does not depend on its
    neighbours.
    """

    def __init__(self, config: LlamaMoeConfig) -> None:
        super().__init__()
        self.gate = LlamaMoeRouter(config)
        self.experts = LlamaMoeExperts(config)
        self.meta_expert: LlamaMLP | None = None
        if config.meta_expert:
            self.meta_expert = LlamaMLP(config)

    def forward(self, hidden_states: Tensor) -> Tensor:
        tokens = hidden_states.reshape(-1, hidden_states.shape[-1])  # (N, H)
        _, top_k_weights, top_k_index = self.gate(tokens)
        output: Tensor = self.experts(tokens, top_k_index, top_k_weights)  # (N, H)
        if self.meta_expert is not None:
            output = output + self.meta_expert(tokens)
        return output.reshape(hidden_states.shape)


class LlamaMoeRouter(nn.Module):
    """Chooses k experts per token in float32, whatever the dtype of the model or of autocast."""

    def __init__(self, config: LlamaMoeConfig) -> None:
        super().__init__()
        self.top_k = config.num_experts_per_tok
        self.norm_topk_prob = config.norm_topk_prob
        self.frozen = config.router_frozen
        weight = torch.empty(config.num_experts, config.hidden_size, dtype=torch.float32)
        self.weight = nn.Parameter(weight, requires_grad=not self.frozen)
        bias = torch.empty(config.num_experts, dtype=torch.float32) if config.router_bias else None
        self.bias = None if bias is None else nn.Parameter(bias, requires_grad=not self.frozen)

    def forward(self, hidden_states: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Route.

        Args:
            hidden_states: (N, H).

        Returns:
            router_logits (N, E) float32, weights of the chosen experts (N, k) float32, their
            indices (N, k) int64.
        """
        weight, bias = self.weight.float(), None if self.bias is None else self.bias.float()
        if self.frozen:  # a trainer that sets requires_grad on everything must not thaw it
            weight, bias = weight.detach(), None if bias is None else bias.detach()
        # float32: bfloat16 logits tie, and top-k breaks ties in no promised order
        with maybe_autocast(hidden_states.device.type, enabled=False):
            router_logits = F.linear(hidden_states.float(), weight, bias)
        probabilities = router_logits.softmax(dim=-1)
        top_k_weights, top_k_index = probabilities.topk(self.top_k, dim=-1)
        if self.norm_topk_prob:
            top_k_weights = top_k_weights / top_k_weights.sum(dim=-1, keepdim=True)
        return router_logits, top_k_weights, top_k_index


@use_experts_implementation
class LlamaMoeExperts(nn.Module):
    """E gated MLPs as two parameters: `gate_up_proj` (E, 2I, H), gate first, `down_proj` (E, H, I).

    `forward` is the plain form, chosen by `experts_implementation="eager"`; the decorator sends a
    call to the implementation that the model was loaded with.
    """

    def __init__(self, config: LlamaMoeConfig) -> None:
        super().__init__()
        width = config.expert_width
        self.num_experts = config.num_experts
        self.hidden_dim = config.hidden_size
        self.intermediate_dim = width
        self.gate_up_proj = nn.Parameter(
            torch.empty(config.num_experts, 2 * width, config.hidden_size)
        )
        self.down_proj = nn.Parameter(torch.empty(config.num_experts, config.hidden_size, width))
        self.act_fn = ACT2FN[config.hidden_act]

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """(N, H) tokens, (N, k) expert indices, (N, k) weights to (N, H)."""
        return eager_experts_forward(self, hidden_states, top_k_index, top_k_weights)


def eager_experts_forward(
    experts: LlamaMoeExperts, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor
) -> Tensor:
    """One expert after the other, each on its tokens; the others are tested against this form."""
    output = torch.zeros_like(hidden_states)
    # One backward for all: indexing would add E gradients of the whole weight's size.
    gate_up_proj, down_proj = experts.gate_up_proj.unbind(0), experts.down_proj.unbind(0)
    # An index equal to num_experts means: on another rank.
    for expert in range(experts.num_experts):
        token, slot = torch.where(top_k_index == expert)
        if token.numel() == 0:
            continue
        gate, up = F.linear(hidden_states[token], gate_up_proj[expert]).chunk(2, dim=-1)
        expert_output = F.linear(experts.act_fn(gate) * up, down_proj[expert])
        weighted = expert_output * top_k_weights[token, slot, None]
        output.index_add_(0, token, weighted.to(output.dtype))
    return output


def fastest_experts_forward(
    experts: LlamaMoeExperts, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor
) -> Tensor:
    """The implementation that is fastest at this shape, by tests/benchmarks/language_model.py.

    `grouped_mm`, except: one product after the other for a single token on the CPU, where sorting
    costs more than it saves; `batched_mm` off the CPU for up to E assignments, since it gathers a
    copy of the weights for each, which bounds the copies by the experts' own size; and `eager` if a
    row of the weights is not a multiple of 16 bytes, which `grouped_mm` refuses.
    """
    weight = experts.gate_up_proj
    if hidden_states.shape[0] == 1 and weight.device.type == "cpu" and _is_plain_inference(experts):
        return _single_token_forward(experts, hidden_states, top_k_index, top_k_weights)
    if any(part.shape[-1] * part.element_size() % 16 for part in (weight, experts.down_proj)):
        return eager_experts_forward(experts, hidden_states, top_k_index, top_k_weights)
    is_small = weight.device.type != "cpu" and top_k_index.numel() <= experts.num_experts
    name = "batched_mm" if is_small else "grouped_mm"
    output: Tensor = ALL_EXPERTS_FUNCTIONS[name](experts, hidden_states, top_k_index, top_k_weights)
    return output


def _is_plain_inference(experts: LlamaMoeExperts) -> bool:
    """Neither training, nor compiling, where values cannot go to Python, nor sharded weights."""
    is_plain = type(experts.gate_up_proj.data) is Tensor
    return is_plain and not torch.is_grad_enabled() and not torch.compiler.is_compiling()


def _single_token_forward(
    experts: LlamaMoeExperts, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor
) -> Tensor:
    """Decoding's shape, (1, H) and (1, k) to (1, H); each chosen expert is read once."""
    output = torch.zeros_like(
        hidden_states, dtype=torch.promote_types(hidden_states.dtype, top_k_weights.dtype)
    )
    for slot, expert in enumerate(top_k_index[0].tolist()):
        if expert < experts.num_experts:  # otherwise on another rank
            gate, up = F.linear(hidden_states, experts.gate_up_proj[expert]).chunk(2, dim=-1)
            expert_output = F.linear(experts.act_fn(gate) * up, experts.down_proj[expert])
            output += expert_output * top_k_weights[:, slot, None]
    return output.to(hidden_states.dtype)


ALL_EXPERTS_FUNCTIONS.register(DEFAULT_EXPERTS_IMPLEMENTATION, fastest_experts_forward)


def expert_load(
    router_logits: Tensor, num_experts: int, top_k: int, attention_mask: Tensor | None = None
) -> Tensor:
    """F, the share of one layer's assignments that each expert received: (E,) float32, sums to 1.

    Arguments are those of `load_balancing_loss`, for one layer.
    """
    top_k_index = router_logits.topk(top_k, dim=-1).indices  # (N, k)
    assigned = F.one_hot(top_k_index, num_experts).sum(dim=1).float()  # (N, E)
    return _masked_mean(assigned, attention_mask) / top_k


def load_balancing_loss(
    router_logits: Sequence[Tensor],
    num_experts: int,
    top_k: int,
    attention_mask: Tensor | None = None,
) -> Tensor:
    """Penalty for uneven routing: the mean over layers of E * sum_i F_i P_i, padding left out.

    F_i is the share of assignments that expert i received and P_i its mean probability (Switch
    Transformer, arXiv 2101.03961, eq. 4-6). The scale: 1.0 when balanced, under any k; E when all
    tokens go to one expert under top-1. transformers counts F per token instead, so its value is k
    times this one, and it pools F and P over the layers before multiplying, which lets two
    unbalanced layers cancel out. MoE-LLaVA sums over layers instead of averaging, so its
    coefficient c is c * (number of sparse layers) here.

    Args:
        router_logits: one (B*T, E) tensor per sparse layer, before the softmax.
        attention_mask: (B, T), 1 for tokens and 0 for padding. A longer one, which also covers
            cached tokens, is cut to its last T columns.

    Returns:
        A float32 scalar.

    Raises:
        ValueError: if there are no logits, or the mask does not fit them; both numbers are given.
    """
    if len(router_logits) == 0:
        raise ValueError(
            "No router logits to balance. Run the model with output_router_logits=True."
        )
    losses = []
    for logits in router_logits:
        load = expert_load(logits, num_experts, top_k, attention_mask)
        probability = _masked_mean(logits.float().softmax(dim=-1), attention_mask)
        losses.append(num_experts * (load * probability).sum())
    return torch.stack([loss.to(losses[0].device) for loss in losses]).mean()


def router_z_loss(router_logits: Sequence[Tensor], attention_mask: Tensor | None = None) -> Tensor:
    """The mean over layers and tokens of logsumexp(logits)^2, which keeps the logits small.

    From ST-MoE, arXiv 2202.08906. Arguments and errors are those of `load_balancing_loss`.
    """
    if len(router_logits) == 0:
        raise ValueError(
            "No router logits to penalise. Run the model with output_router_logits=True."
        )
    losses = [
        _masked_mean(logits.float().logsumexp(dim=-1).square(), attention_mask)
        for logits in router_logits
    ]
    return torch.stack([loss.to(losses[0].device) for loss in losses]).mean()


def router_penalty(
    config: LlamaMoeConfig,
    router_logits: Sequence[Tensor],
    attention_mask: Tensor | None = None,
    *,
    labels: Tensor | None = None,
    num_items_in_batch: Tensor | int | None = None,
) -> Tensor:
    """What the router adds to the training loss: both losses times their coefficients in `config`.

    With `num_items_in_batch`, the language-model loss of a micro-batch is its share of a larger
    batch's mean; the penalty is scaled by the same share of the labels, so that gradient
    accumulation leaves its weight unchanged.
    """
    penalty = config.router_aux_loss_coef * load_balancing_loss(
        router_logits, config.num_experts, config.num_experts_per_tok, attention_mask
    )
    if config.router_z_loss_coef:
        penalty = penalty + config.router_z_loss_coef * router_z_loss(router_logits, attention_mask)
    if labels is not None and num_items_in_batch is not None:
        share = (labels[..., 1:] != -100).sum() / num_items_in_batch
        penalty = penalty * share.to(penalty.device)
    return penalty


def has_router_penalty(config: PreTrainedConfig) -> bool:
    """Whether training this language model adds a router loss; dense ones have no routers."""
    coefficients = ("router_aux_loss_coef", "router_z_loss_coef")
    return is_mixture_config(config) and any(getattr(config, name, 0) for name in coefficients)


def add_router_losses(
    config: LlamaMoeConfig,
    loss: Tensor | None,
    router_logits: Sequence[Tensor] | None,
    attention_mask: object,
    *,
    is_penalised: bool,
    labels: Tensor | None = None,
    num_items_in_batch: Tensor | int | None = None,
) -> tuple[Tensor | None, Tensor | None]:
    """`loss`, with the router's penalty if `is_penalised`, and `aux_loss`, the load-balancing loss.

    Padding is known from a 2-D `attention_mask` only. Without router logits: `loss` as it came, and
    None.
    """
    if not router_logits:
        return loss, None
    mask = None
    if isinstance(attention_mask, Tensor) and attention_mask.dim() == 2:
        mask = attention_mask
    aux_loss = load_balancing_loss(
        router_logits, config.num_experts, config.num_experts_per_tok, mask
    )
    if loss is not None and is_penalised:
        penalty = router_penalty(
            config, router_logits, mask, labels=labels, num_items_in_batch=num_items_in_batch
        )
        # not +=: FSDP2 warns about in-place changes of outputs
        loss = loss + penalty.to(loss.device)
    return loss, aux_loss


class Decoded(Protocol):
    """What a decoder returns, with a place for router logits."""

    last_hidden_state: Tensor
    cache: Cache | None
    hidden_states: tuple[Tensor, ...] | None
    attentions: tuple[Tensor, ...] | None
    router_logits: tuple[Tensor, ...] | None


class CausalLM(Protocol):
    """A decoder's owner: what `lm_outputs` uses of it."""

    training: bool
    lm_head: nn.Module
    loss_function: Callable[..., Tensor]


class CausalLMFields(TypedDict):
    """Fields of transformers' outputs of causal language models with experts."""

    loss: Tensor | None
    aux_loss: Tensor | None
    logits: Tensor
    cache: Cache | None
    hidden_states: tuple[Tensor, ...] | None
    attentions: tuple[Tensor, ...] | None
    router_logits: tuple[Tensor, ...] | None


DecodedT = TypeVar("DecodedT", bound=Decoded)


def lm_outputs(
    model: CausalLM,
    config: PreTrainedConfig,
    decode: Callable[..., DecodedT],
    *,
    attention_mask: object,
    labels: Tensor | None,
    output_router_logits: bool | None,
    logits_to_keep: int | Tensor,
    **kwargs: Any,
) -> tuple[CausalLMFields, DecodedT]:
    """Decode, then logits (B, T, V), losses and router logits, for any causal model with experts.

    Args:
        config: the language model's; a dense one has no router losses.
        decode: the model without its head, called with `attention_mask`, `output_router_logits` and
            `kwargs`.
        output_router_logits: None means what `config` says.
        **kwargs: for `decode` and for the model's `loss_function`.

    Returns:
        Fields for the output class, and what `decode` returned.
    """
    if output_router_logits is None:
        output_router_logits = getattr(config, "output_router_logits", False)
    is_penalised = model.training and labels is not None and has_router_penalty(config)
    decoded = decode(
        attention_mask=attention_mask,
        output_router_logits=output_router_logits or is_penalised,
        **kwargs,
    )
    logits: Tensor = model.lm_head(slice_logits_to_keep(decoded.last_hidden_state, logits_to_keep))
    loss: Tensor | None = None
    if labels is not None:
        loss = model.loss_function(
            logits=logits, labels=labels, vocab_size=config.vocab_size, **kwargs
        )
    loss, aux_loss = add_router_losses(
        cast(
            LlamaMoeConfig, config
        ),  # a dense model has no router logits, and its config is unused
        loss,
        decoded.router_logits,
        attention_mask,
        is_penalised=is_penalised,
        labels=labels,
        num_items_in_batch=kwargs.get("num_items_in_batch"),
    )
    fields: CausalLMFields = {
        "loss": loss,
        "aux_loss": aux_loss,
        "logits": logits,
        "cache": decoded.cache,
        "hidden_states": decoded.hidden_states,
        "attentions": decoded.attentions,
        "router_logits": decoded.router_logits if output_router_logits else None,
    }
    return fields, decoded


def _masked_mean(values: Tensor, attention_mask: Tensor | None) -> Tensor:
    """The mean of (N, ...) over the tokens whose mask is not 0."""
    if attention_mask is None:
        return values.mean(dim=0)
    num_rows, batch_size = values.shape[0], attention_mask.shape[0]
    length = num_rows // batch_size
    covers = length * batch_size == num_rows and length <= attention_mask.shape[-1]
    if attention_mask.dim() != 2 or not covers:
        raise ValueError(
            f"The attention mask is {tuple(attention_mask.shape)}, but there are router logits of "
            f"{num_rows} tokens. Give a (B, T) mask with one row per sample."
        )
    of_these = attention_mask[:, attention_mask.shape[1] - length :]
    is_token = of_these.reshape(-1).to(values.device, values.dtype)
    is_token = is_token.view(-1, *[1] * (values.dim() - 1))
    return (values * is_token).sum(dim=0) / is_token.sum().clamp(min=1)
