"""Low-rank adapters by PEFT on chosen parts of a model.

| name | what it gives |
|---|---|
| `lora_config` | PEFT's config for adapters on any parts, for our recipes and for other trainers |
| `with_adapters` | a PEFT model of a recipe's parts |
| `merge_adapters` | the ordinary model that adapters make of their base |
"""

import re
from collections.abc import Collection, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import nn

from moellava.model.checkpoint.adapter import read_adapter
from moellava.model.modeling_moellava import MoeLlavaForConditionalGeneration
from moellava.model.quantization import quantized_weights
from moellava.model.quantization.adapters import accept_rounded
from moellava.model.quantization.modules import QuantizedLinear
from moellava.train.options import Lora
from moellava.train.parts import WHOLE_LANGUAGE_MODEL, is_of, part_of, weight_names
from moellava.train.trainable import require_parts, tower_weights

if TYPE_CHECKING:
    from peft import LoraConfig, PeftModel
    from transformers import PreTrainedModel

# What an adapter on the whole language model is on: as LLaVA-1.5, all linear layers but the head.
_IN_LANGUAGE_MODEL = ("attention", "mlp", "meta_expert", "experts")
# Parts whose weights are bare parameters of a module, not `nn.Linear`.
_PARAMETERS = ("experts", "router")


def lora_config(
    model: MoeLlavaForConditionalGeneration,
    parts: Sequence[str],
    *,
    rank: int = 64,
    alpha: int = 128,
    dropout: float = 0.0,
    whole: Sequence[str] = (),
    tower_blocks: int | None = None,
) -> "LoraConfig":
    """PEFT's config for adapters on some parts of a model, for `peft.get_peft_model` or TRL.

    PEFT's own `target_modules="all-linear"` misses the experts, the routers and the embeddings, and
    reaches into blocks of the tower that do not run.

    Args:
        parts: of `moellava.train.parts.PARTS`. `language_model` is its attention, MLPs and experts,
            without embeddings and routers.
        alpha: adapters are scaled by `alpha / rank`.
        dropout: of the adapters' inputs, 0..1; PEFT has none for experts and routers.
        whole: parts that are trained whole beside the adapters.
        tower_blocks: of the vision tower, only the last so many blocks among those that run.

    Raises:
        ValueError: for a part that is unknown, missing in the model, frozen, named twice, or
            without weights that could have an adapter; for dropout on experts or routers; for
            experts in 8 or 4 bits.
    """
    from peft import LoraConfig

    require_parts(model, parts, "lora.parts")
    require_parts(model, whole, "whole")
    if both := set(parts) & set(whole):
        raise ValueError(f"{', '.join(sorted(both))}: choose adapters, or train it whole.")
    adapted = _finest(model, parts)
    tower = tower_weights(model, tower_blocks) if "vision_tower" in {*parts, *whole} else set()
    _require_adaptable(model, adapted, dropout)
    modules = [
        name
        for name in _linear_modules(model)
        if (part := part_of(f"{name}.weight")) in adapted
        and (part != "vision_tower" or f"{name}.weight" in tower)
    ]
    parameters = [
        ".".join(name.split(".")[-3:])  # mlp.experts.down_proj
        for name in weight_names(model)
        if part_of(name) in {*adapted} & {*_PARAMETERS} and not name.endswith(".bias")
    ]
    config = LoraConfig(
        r=rank,
        lora_alpha=alpha,
        lora_dropout=dropout,
        target_modules=_pattern(modules),
        target_parameters=sorted(set(parameters)) or None,
        modules_to_save=_whole_modules(model, whole, tower, tower_blocks) or None,
    )
    accept_rounded(config, model)
    return config


def with_adapters(
    model: MoeLlavaForConditionalGeneration,
    parts: Sequence[str],
    lora: Lora,
    *,
    seed: int,
    tower_blocks: int | None = None,
) -> "PeftModel":
    """A PEFT model around `model`, which learns nothing but adapters and parts that stay whole.

    Args:
        parts: what learns; adapters are on `lora.parts` of them, or else on what they name of the
            language model.
        seed: of the adapters' first values, the same on every process.

    Raises:
        ValueError: as `lora_config`; if no part could have an adapter.
    """
    from peft import get_peft_model

    usual = (WHOLE_LANGUAGE_MODEL, *_IN_LANGUAGE_MODEL)
    adapted = lora.parts or tuple(part for part in parts if part in usual)
    if not adapted:
        raise ValueError(
            f"lora adapts the language model or its experts, but trainable is {list(parts)}. Name "
            "the parts that get adapters in lora.parts."
        )
    if missing := [part for part in adapted if part not in parts]:
        raise ValueError(
            f"lora.parts names {', '.join(missing)}, which trainable does not: it is {list(parts)}."
        )
    config = lora_config(
        model,
        adapted,
        rank=lora.rank,
        alpha=lora.alpha,
        dropout=lora.dropout,
        whole=[part for part in parts if part not in adapted],
        tower_blocks=tower_blocks,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return get_peft_model(model, config)


def merge_adapters(base: "PreTrainedModel", adapter: Path) -> "PreTrainedModel":
    """The ordinary model that `base` becomes with the adapters that PEFT saved in a folder.

    Args:
        base: is changed. Weights of 8 or 4 bits are brought to its dtype first.
    """
    if next(quantized_weights(base), None) is not None:
        base.dequantize()
    merged: PreTrainedModel = read_adapter(base, adapter).merge_and_unload()
    return merged


def _finest(model: nn.Module, parts: Collection[str]) -> set[str]:
    """The parts, with those of the language model in its place."""
    present = {part_of(name) for name in weight_names(model)}
    inner = set(_IN_LANGUAGE_MODEL) & present if WHOLE_LANGUAGE_MODEL in parts else set()
    return (set(parts) - {WHOLE_LANGUAGE_MODEL}) | inner


def _linear_modules(model: nn.Module) -> Iterator[str]:
    for name, module in model.named_modules():
        # The projections of torch's own attention are read by it, never called.
        is_read = isinstance(module, nn.modules.linear.NonDynamicallyQuantizableLinear)
        if isinstance(module, nn.Linear | nn.Embedding | QuantizedLinear) and not is_read:
            yield name


def _require_adaptable(
    model: MoeLlavaForConditionalGeneration, adapted: Collection[str], dropout: float
) -> None:
    with_layers = {part_of(f"{name}.weight") for name in _linear_modules(model)}
    for part in adapted:
        if part not in with_layers and part not in _PARAMETERS:
            raise ValueError(
                f"lora.parts names {part!r}, which has no linear layer to adapt. Leave it out of "
                "lora.parts to train it whole."
            )
    bare = sorted({*adapted} & {*_PARAMETERS})
    if bare and dropout:
        raise ValueError(
            f"lora.dropout is {dropout}, but PEFT has no dropout for fused {' and '.join(bare)}. "
            "Set lora.dropout=0."
        )
    if "embeddings" in adapted and model.config.tie_word_embeddings:
        raise ValueError(
            "lora.parts names 'embeddings', but this model's input and output embeddings are one "
            "weight, which adapters on both would part. Leave it out of lora.parts."
        )


def _pattern(modules: Sequence[str]) -> str | None:
    """A pattern of exactly these names, with one alternative for equal names of many layers."""
    alike = dict.fromkeys(re.sub(r"\.\d+(?=\.)", r".#", name) for name in modules)
    numbers: dict[str, list[str]] = {name: [] for name in alike}
    for name in modules:
        numbers[re.sub(r"\.\d+(?=\.)", r".#", name)].append(name)
    words = []
    for name, members in numbers.items():
        if name.count(".#") == 1 and len(members) > 1:
            found = "|".join(str(re.search(r"\.(\d+)\.", member)[1]) for member in members)  # type: ignore[index]
            words.append(re.escape(name).replace(re.escape(".#"), rf"\.(?:{found})"))
        else:
            words += [re.escape(member) for member in members]
    return "|".join(words) or None


def _whole_modules(
    model: MoeLlavaForConditionalGeneration,
    whole: Collection[str],
    tower: Collection[str],
    tower_blocks: int | None,
) -> list[str]:
    """The largest modules that have weights of these parts and no others."""
    found: list[str] = []
    if "vision_tower" in whole and tower_blocks is None:
        found.append("model.vision_tower")  # with what does not run, since it is called as one
    learning = {
        name
        for name, _ in model.named_parameters()
        if (name in tower and "vision_tower" in whole and tower_blocks is not None)
        or any(is_of(name, part) for part in whole if part != "vision_tower")
    }
    for name, module in model.named_modules():
        weights = [f"{name}.{inner}" for inner, _ in module.named_parameters()]
        is_inside = any(name.startswith(f"{outer}.") for outer in found)
        if name and weights and not is_inside and learning.issuperset(weights):
            found.append(name)
    return found
