"""Arithmetic for a plan: memory of a device and work of a row, before anything is trained.

Checked in the tests against the tensors that autograd really keeps and against torch's FLOP
counter: B rows and T tokens at once, H width, I width of the MLP, L layers, V vocabulary.

| name | what it gives |
|---|---|
| `estimate_memory` | GiB of one device, by what they are for |
| `estimate_flops` | FLOP of one row, forward and backward |
| `CARD` | the graphics card that hours are estimated for |
"""

from collections.abc import Iterable
from typing import TYPE_CHECKING, NamedTuple, cast

from torch import Tensor, nn
from transformers import PreTrainedConfig

from moellava.model.describe import count_active_parameters
from moellava.model.language_model.configuration_llama_moe import is_mixture_config
from moellava.model.modeling_moellava import MoeLlavaForConditionalGeneration
from moellava.train.options import Recipe

if TYPE_CHECKING:
    from peft import PeftModel

GIB = 2**30
# Bytes that an optimizer keeps per byte of a trained weight; transformers' names.
OPTIMIZER_STATES = {
    "adamw_torch": 2.0,
    "adamw_torch_fused": 2.0,
    "adamw_8bit": 0.5,  # two states of one byte each, of four-byte weights
    "adamw_bnb_8bit": 0.5,
    "paged_adamw_8bit": 0.5,
    "adamw_torch_8bit": 0.5,
    "adafactor": 0.01,  # a row and a column per matrix
    "sgd": 0.0,
}


class Card(NamedTuple):
    """A graphics card, and the share of its published speed that training is assumed to reach."""

    name: str
    flops: float  # dense bfloat16, per second
    utilisation: float

    def hours(self, flops: float) -> float:
        """Time for so much work."""
        return flops / (self.utilisation * self.flops) / 3600


# NVIDIA's A100 data sheet: 312 TFLOP/s dense bfloat16. PaLM (arXiv 2204.02311, section 4.1) and the
# models that it compares with reached 21 to 46 % of their machines' peaks.
CARD = Card("A100", 312e12, 0.35)


def estimate_memory(model: nn.Module, recipe: Recipe, *, longest: int) -> dict[str, float]:
    """GiB of one device that holds the whole model, by what they are for.

    Args:
        longest: T, tokens of the longest row.

    Returns:
        `weights`, `gradients`, `optimizer`, `activations` and their sum, `all`. Fragments
        and the libraries' own memory, some 1 to 2 GiB on a GPU, come on top.
    """
    optim = recipe.optim
    weights = float(_num_bytes(model.parameters()))
    gradients = _num_bytes(weight for weight in model.parameters() if weight.requires_grad)
    if optim.precision == "bf16":  # autocast keeps a bfloat16 copy of each matrix that it has used
        weights += _num_bytes(model.parameters()) / 2
    states = OPTIMIZER_STATES.get(optim.optimizer, 2.0)
    found = {
        "weights": weights / GIB,
        "gradients": gradients / GIB,
        "optimizer": gradients * states / GIB,
        "activations": _activation_bytes(model, recipe, longest) / GIB,
    }
    return {**found, "all": sum(found.values())}


def _num_bytes(weights: Iterable[Tensor]) -> int:
    return sum(weight.numel() * weight.element_size() for weight in weights)


def _activation_bytes(model: nn.Module, recipe: Recipe, longest: int) -> float:
    """What autograd keeps of the language model for the backward pass; a frozen tower adds none.

    If nothing learns, what one layer and the logits take.
    """
    text = _unwrapped(model).config.text_config
    tokens = recipe.optim.per_device_batch_size * longest
    wide = 4  # norms and the sum of all layers stay float32 under autocast
    narrow = 4 if recipe.optim.precision == "fp32" else 2
    if recipe.optim.precision == "bf16_weights":
        wide = 2
    hidden, inner = text.hidden_size, text.intermediate_size
    kv = hidden * text.num_key_value_heads / text.num_attention_heads
    # Per token of a layer: norms (input, its float32 twin, output), q k v and their rotations,
    # attention's output; gate, up, their activation and product, for each MLP that a token meets.
    layers, num_mlps = text.num_hidden_layers, _mlps_per_layer(text)
    one_layer = (
        2 * hidden * (2 * wide + narrow)
        + narrow * (3 * hidden + 4 * kv)
        + num_mlps * 4 * inner * narrow
    )
    if not any(weight.requires_grad for weight in model.parameters()):
        return float(tokens * (one_layer + text.vocab_size * narrow))
    if recipe.optim.activation_checkpointing:
        kept = layers * hidden * wide + one_layer
    else:
        kept = layers * one_layer
    logits = text.vocab_size * (narrow + 2 * 4)  # float32 for the loss, and their gradient
    return float(tokens * (kept + logits))


def _mlps_per_layer(text: PreTrainedConfig) -> float:
    """MLPs that a token passes in a layer, mean over layers."""
    if not is_mixture_config(text):
        return 1.0
    sparse = len(text.moe_layer_indices) / text.num_hidden_layers
    return float(1 - sparse + sparse * (text.num_experts_per_tok + text.meta_expert))


def estimate_flops(
    model: nn.Module, recipe: Recipe, *, length: float, images_per_row: float
) -> float:
    """FLOP of one row: forward, backward, and the forward that activation checkpointing repeats.

    A matrix costs 2 FLOP per weight and token forward, 2 for the gradient of its input and 2, if it
    learns, for its own; attention 4 T H per token forward and twice that backward.
    """
    base = _unwrapped(model)
    text, vision = base.config.text_config, base.config.vision_config
    language_model = base.model.language_model
    # The embedding table, which costs nothing, is counted in place of the head.
    active = count_active_parameters(language_model)
    learning = sum(weight.numel() for weight in language_model.parameters() if weight.requires_grad)
    share = learning / sum(weight.numel() for weight in language_model.parameters())
    attention = 4 * length * text.hidden_size * text.num_hidden_layers / 2  # half: it is causal
    forward = 2 * active + attention
    is_trained = any(weight.requires_grad for weight in model.parameters())
    passes = 1 + is_trained * (1 + share + recipe.optim.activation_checkpointing)
    tower = sum(weight.numel() for weight in base.model.vision_tower.parameters())
    tower_flops = 2 * tower * (vision.num_patches or 1)
    return float(length * forward * passes + images_per_row * tower_flops)


def _unwrapped(model: nn.Module) -> MoeLlavaForConditionalGeneration:
    """The model inside of PEFT's wrapper, or the model itself."""
    if isinstance(model, MoeLlavaForConditionalGeneration):
        return model
    return cast("MoeLlavaForConditionalGeneration", cast("PeftModel", model).get_base_model())
