"""A recipe → what would be trained, in how many steps, and an estimate of memory and work; nothing is trained.

Public names: `plan`, `Plan`, `estimate_memory`, `estimate_flops`, `list_trained`.

The estimates are arithmetic, checked in the tests against the tensors that autograd really keeps and against torch's
FLOP counter: B rows and T tokens at once, H width, I width of the MLP, L layers, V vocabulary.
"""

import math
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from statistics import mean
from typing import Any

from torch import nn

from moellava.data.chat_labels import image_items
from moellava.data.collate import messages_of
from moellava.model.describe import count_active_parameters
from moellava.model.language_model import moe_config_from_dense
from moellava.model.language_model.configuration_llama_moe import is_mixture_config
from moellava.train.arguments import run_folder, training_arguments
from moellava.train.batches import TrainData, build_collator, read_data, row_lengths
from moellava.train.recipe import Recipe
from moellava.train.stages import outline_model, prepare_model

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


@dataclass(frozen=True)
class Plan:
    """What a recipe would do, as numbers; `text` is for reading."""

    num_trained: int
    num_parameters: int
    num_rows: int
    num_steps: int
    memory: dict[str, float]  # GiB per device
    flops: float  # of the whole run
    text: str


def plan(recipe: Recipe) -> Plan:
    """Read the rows and the model's config, count, and estimate; the model is built on torch's meta device.

    Raises: as `moellava.train.train` before its first step.
    """
    if recipe.stage == "router":
        return _plan_router(recipe)
    arguments = training_arguments(recipe, show_progress=False)
    data = read_data(recipe)
    model, loaded = prepare_model(recipe, on_meta=True)
    optim, lengths = recipe.optim, row_lengths(data.train, build_collator(recipe, loaded.processor))
    per_epoch = math.ceil(len(lengths) / optim.batch_size)
    num_steps = optim.max_steps or math.ceil(per_epoch * optim.epochs)
    num_rows = (
        num_steps * optim.batch_size if optim.max_steps else math.ceil(optim.epochs * len(lengths))
    )
    memory = estimate_memory(model, recipe, longest=max(lengths))
    images = 0.0 if recipe.data.features else _images_per_row(data)
    flops = num_rows * estimate_flops(model, recipe, length=mean(lengths), images_per_row=images)
    total = sum(weight.numel() for weight in model.parameters())
    trained = sum(weight.numel() for weight in model.parameters() if weight.requires_grad)
    lines = [
        f"stage {recipe.stage}: trains {trained:,} of {total:,} parameters ({100 * trained / total:.2f} %)",
        *(f"  {line}" for line in list_trained(model)),
        _describe_rows(data, lengths),
        f"steps {num_steps:,} of {optim.batch_size} rows: {optim.per_device_batch_size} at once, "
        f"{arguments.gradient_accumulation_steps} accumulated, {arguments.world_size} processes; {per_epoch:,} a pass",
        f"warm-up {arguments.get_warmup_steps(num_steps)} steps to {optim.learning_rate:g}, then "
        f"{optim.schedule}; {optim.optimizer}, {optim.precision}",
        *_describe_costs(memory, flops),
    ]
    return Plan(trained, total, len(lengths), num_steps, memory, flops, "\n".join(lines))


def _plan_router(recipe: Recipe) -> Plan:
    """One forward pass over the rows, then a linear layer is fitted to what it gave."""
    run_folder(recipe)
    data = read_data(recipe)
    loaded = outline_model(recipe)
    optim, lengths = recipe.optim, row_lengths(data.train, build_collator(recipe, loaded.processor))
    mixture = moe_config_from_dense(loaded.model.config.text_config, **recipe.moe.config)
    total = sum(weight.numel() for weight in loaded.model.parameters())
    trained = mixture.num_experts * (mixture.hidden_size + 1)
    epochs = math.ceil(optim.epochs)
    num_steps = epochs * math.ceil(len(lengths) / optim.batch_size)
    loaded.model.requires_grad_(False)
    memory = estimate_memory(loaded.model, recipe, longest=max(lengths))
    images = _images_per_row(data)
    flops = len(lengths) * estimate_flops(
        loaded.model, recipe, length=mean(lengths), images_per_row=images
    )
    lines = [
        f"stage router: trains {trained:,} parameters; the model's {total:,} stay as they are",
        f"  router.weight ({mixture.num_experts}, {mixture.hidden_size}), router.bias ({mixture.num_experts},), for "
        f"layers {_ranges(mixture.moe_layer_indices)}",
        _describe_rows(data, lengths),
        f"one pass of the model, then {num_steps:,} steps of {optim.batch_size} rows by Adam, rate "
        f"{optim.learning_rate:g}, {epochs} passes over its hidden states",
        *_describe_costs(memory, flops),
    ]
    return Plan(trained, total, len(lengths), num_steps, memory, flops, "\n".join(lines))


def _images_per_row(data: TrainData) -> float:
    """Of the first thousand rows."""
    rows = (data.train[index] for index in range(min(len(data.train), 1000)))
    return mean(len(image_items(messages_of(row))) for row in rows)


def _describe_rows(data: TrainData, lengths: Sequence[int]) -> str:
    return (
        f"rows {len(lengths):,}, tokens of a row {min(lengths)} to {max(lengths)}, mean {mean(lengths):.0f}; "
        f"held-out rows {len(data.evaluation) if data.evaluation is not None else 0:,}"
    )


def _describe_costs(memory: dict[str, float], flops: float) -> list[str]:
    return [
        "memory of one device, estimated for a batch of the longest rows, without sharding:",
        *(f"  {name:<14} {value:8.2f} GiB" for name, value in memory.items()),
        f"work {flops:.3g} FLOP, about {flops / (0.35 * 312e12) / 3600:.2g} hours on one A100 "
        "(35 % of 312 TFLOP/s assumed)",
    ]


def list_trained(model: nn.Module) -> list[str]:
    """The weights that learn, equal names of different layers in one line."""
    groups: dict[tuple[str, tuple[int, ...]], list[str]] = {}
    for name, weight in model.named_parameters():
        if weight.requires_grad:
            key = re.sub(r"\.layers\.\d+\.", ".layers.*.", name), tuple(weight.shape)
            groups.setdefault(key, []).append(name)
    lines = []
    for (name, shape), names in groups.items():
        layers = [int(match[1]) for one in names if (match := re.search(r"\.layers\.(\d+)\.", one))]
        where = f"  in layers {_ranges(layers)}" if layers else ""
        lines.append(f"{name} {shape}{where}: {len(names) * math.prod(shape):,}")
    return lines


def _ranges(numbers: Sequence[int]) -> str:
    """Ascending whole numbers in few words: 0-21, or 0,2,...,20."""
    if len(numbers) > 2 and len({b - a for a, b in pairwise(numbers)}) == 1:
        step = numbers[1] - numbers[0]
        return (
            f"{numbers[0]}-{numbers[-1]}"
            if step == 1
            else f"{numbers[0]},{numbers[1]},...,{numbers[-1]}"
        )
    return ",".join(map(str, numbers))


def estimate_memory(model: Any, recipe: Recipe, *, longest: int) -> dict[str, float]:
    """GiB of one device that holds the whole model, by what they are for.

    Args:
        longest: T, tokens of the longest row.

    Returns:
        `weights`, `gradients`, `optimizer`, `activations` and their sum, `all`. Fragments and the libraries' own
        memory, some 1 to 2 GiB on a GPU, come on top.
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


def _num_bytes(weights: Iterable[Any]) -> int:
    return sum(weight.numel() * weight.element_size() for weight in weights)


def _activation_bytes(model: Any, recipe: Recipe, longest: int) -> float:
    """What autograd keeps of the language model for the backward pass; the frozen tower keeps nothing.

    Where nothing learns, what one layer and the logits take.
    """
    text = model.config.text_config
    tokens = recipe.optim.per_device_batch_size * longest
    wide = 4  # norms and the sum of all layers stay float32 under autocast
    narrow = 4 if recipe.optim.precision == "fp32" else 2
    if recipe.optim.precision == "bf16_weights":
        wide = 2
    hidden, inner = text.hidden_size, text.intermediate_size
    kv = hidden * text.num_key_value_heads / text.num_attention_heads
    # Per token of a layer: norms (input, its float32 twin, output), q k v and their rotations, attention's output;
    # gate, up, their activation and product, each for the MLPs that a token meets.
    layers, num_mlps = text.num_hidden_layers, _mlps_per_layer(text)
    one_layer = (
        2 * hidden * (2 * wide + narrow)
        + narrow * (3 * hidden + 4 * kv)
        + num_mlps * 4 * inner * narrow
    )
    if not any(weight.requires_grad for weight in model.parameters()):
        return tokens * (one_layer + text.vocab_size * narrow)
    kept = (
        layers * hidden * wide + one_layer
        if recipe.optim.activation_checkpointing
        else layers * one_layer
    )
    logits = text.vocab_size * (narrow + 2 * 4)  # float32 for the loss, and their gradient
    return tokens * (kept + logits)


def _mlps_per_layer(text: Any) -> float:
    """MLPs that a token passes in a layer, mean over layers."""
    if not is_mixture_config(text):
        return 1.0
    sparse = len(text.moe_layer_indices) / text.num_hidden_layers
    return 1 - sparse + sparse * (text.num_experts_per_tok + text.meta_expert)


def estimate_flops(model: Any, recipe: Recipe, *, length: float, images_per_row: float) -> float:
    """FLOP of one row: forward, backward, and the forward that activation checkpointing repeats.

    A matrix costs 2 FLOP per weight and token forward, 2 for the gradient of its input and 2, if it learns, for its
    own; attention 4 T H per token forward and twice that backward.
    """
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    text, vision = base.config.text_config, base.config.vision_config
    language_model = base.model.language_model
    active = count_active_parameters(
        language_model
    )  # the table, which costs nothing, stands for the head
    learning = sum(weight.numel() for weight in language_model.parameters() if weight.requires_grad)
    share = learning / sum(weight.numel() for weight in language_model.parameters())
    forward = (
        2 * active + 4 * length * text.hidden_size * text.num_hidden_layers / 2
    )  # half: attention is causal
    is_trained = any(weight.requires_grad for weight in model.parameters())
    passes = 1 + is_trained * (1 + share + recipe.optim.activation_checkpointing)
    tower = sum(weight.numel() for weight in base.model.vision_tower.parameters())
    return length * forward * passes + images_per_row * 2 * tower * (vision.num_patches or 1)
