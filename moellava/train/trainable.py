"""Which weights of a model learn: `PARTS`, `set_trainable`, `with_adapters`, `merge_adapters`."""

import re
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import nn

from moellava.messages import unknown_name
from moellava.model.checkpoint.adapter import read_adapter
from moellava.model.language_model.configuration_llama_moe import is_mixture_config
from moellava.model.modeling_moellava import MoeLlavaForConditionalGeneration
from moellava.model.quantization import quantized_weights, require_ordinary
from moellava.model.quantization.adapters import accept_rounded
from moellava.train.options import Lora

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel

# What `trainable` may name, as patterns of parameter names.
PARTS = {
    "vision_tower": r"^model\.vision_tower\.",
    "projector": r"^model\.multi_modal_projector\.",
    "language_model": r"^(model\.language_model|lm_head)\.",
    "mlp": r"^model\.language_model\..*\.mlp\.(gate_proj|up_proj|down_proj)\.",
    "experts": r"\.mlp\.experts\.",
    "meta_expert": r"\.mlp\.meta_expert\.",
    "router": r"\.mlp\.gate\.",
}
_OF_LANGUAGE_MODEL = {"language_model", "mlp", "experts", "meta_expert"}
# With adapters: the parts whose linear layers or experts get one, and the modules of others that
# are trained whole.
_ADAPTED_LINEARS = (
    r".*language_model\..*\.(q_proj|k_proj|v_proj|o_proj|gate_proj|up_proj|down_proj)"
)
_ADAPTED_MLPS = r".*language_model\..*\.mlp\.(gate_proj|up_proj|down_proj)"
_ADAPTED_META_EXPERTS = r".*\.meta_expert\.(gate_proj|up_proj|down_proj)"
_EXPERT_WEIGHTS = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
_WHOLE = {"projector": "multi_modal_projector", "router": "gate", "vision_tower": "vision_tower"}


def set_trainable(model: MoeLlavaForConditionalGeneration, parts: Collection[str]) -> int:
    """Let the named parts learn and freeze all else.

    Returns:
        How many parameters learn.

    Raises:
        ValueError: for a part that is unknown, missing in the model, frozen by its config, or in 8
            or 4 bits.
    """
    for part in parts:
        if part not in PARTS:
            raise unknown_name("part in trainable:", part, PARTS)
    if set(parts) & _OF_LANGUAGE_MODEL:
        require_ordinary(model, f"trainable: {list(parts)} without lora")
    model.requires_grad_(False)
    found = dict.fromkeys(parts, 0)
    frozen_router = getattr(model.config.text_config, "router_frozen", False)
    for name, parameter in model.named_parameters():
        for part in parts:
            if re.search(PARTS[part], name):
                if part == "router" and frozen_router:
                    raise ValueError(
                        "trainable names 'router', but moe.config.router_frozen is true. "
                        "Drop one of them."
                    )
                found[part] += parameter.numel()
                parameter.requires_grad_(not (frozen_router and re.search(PARTS["router"], name)))
    for part, count in found.items():
        if count == 0:
            raise ValueError(
                f"trainable names {part!r}, but the model has no such weights. It has: "
                f"{', '.join(name for name, pattern in PARTS.items() if _has(model, pattern))}."
            )
    if "vision_tower" in parts:
        _freeze_unused_blocks(model)
    return sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)


def _has(model: nn.Module, pattern: str) -> bool:
    return any(re.search(pattern, name) for name, _ in model.named_parameters())


def _freeze_unused_blocks(model: MoeLlavaForConditionalGeneration) -> None:
    """Blocks after the selected layer do not run; DDP would wait for their gradients."""
    tower = model.model.vision_tower
    height, width = model.config.vision_config.image_hw
    pixels = torch.zeros(1, 3, height, width, dtype=tower.dtype, device=tower.device)
    torch.autograd.backward(tower(pixels).patch_tokens.float().sum())
    for parameter in tower.parameters():
        parameter.requires_grad_(parameter.grad is not None)
    tower.zero_grad(set_to_none=True)


def with_adapters(
    model: MoeLlavaForConditionalGeneration, parts: Sequence[str], lora: Lora, *, seed: int
) -> "PeftModel":
    """A PEFT model around `model`.

    What `parts` name of the language model gets adapters, the other parts are trained whole.

    Args:
        seed: of the adapters' first values, the same on every process.

    Raises:
        ValueError: if no part could have an adapter, or for dropout on experts; or for adapters of
            experts in 8 or 4 bits.
    """
    from peft import LoraConfig, get_peft_model

    linears = None
    if "language_model" in parts:
        linears = _ADAPTED_LINEARS
    elif "mlp" in parts:
        linears = _ADAPTED_MLPS
    elif "meta_expert" in parts:
        linears = _ADAPTED_META_EXPERTS
    is_mixture = is_mixture_config(model.config.text_config)
    experts = _EXPERT_WEIGHTS if is_mixture and {"language_model", "experts"} & set(parts) else None
    if linears is None and experts is None:
        raise ValueError(
            f"lora adapts the language model or its experts, but trainable is {list(parts)}."
        )
    if experts and lora.dropout:
        raise ValueError(
            f"lora.dropout is {lora.dropout}, but PEFT has no dropout for fused experts. Set "
            "lora.dropout=0."
        )
    config = LoraConfig(
        r=lora.rank,
        lora_alpha=lora.alpha,
        lora_dropout=lora.dropout,
        target_modules=linears,
        target_parameters=experts,
        modules_to_save=[_WHOLE[part] for part in parts if part in _WHOLE] or None,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return get_peft_model(model, accept_rounded(config, model))


def merge_adapters(base: "PreTrainedModel", adapter: Path) -> "PreTrainedModel":
    """The ordinary model that `base` becomes with the adapters that PEFT saved in a folder.

    Args:
        base: is changed. Weights of 8 or 4 bits are brought to its dtype first.
    """
    if next(quantized_weights(base), None) is not None:
        base.dequantize()
    merged: PreTrainedModel = read_adapter(base, adapter).merge_and_unload()
    return merged
