"""A published mixture in, ours out: Mixtral's, and MoE-LLaVA's and Med-MoE's on a Llama.

E experts, I expert width, H hidden width.

import_mixture        the language model
imported_state_dict   its config and weights
LAYOUTS               where each kind of checkpoint keeps what
"""

import logging
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields

import torch
from torch import Tensor
from transformers import LlamaConfig
from typing_extensions import Unpack

from moellava.messages import unknown_name
from moellava.model.language_model.checkpoint import (
    CheckpointReader,
    Shape,
    is_harmless,
    require_float,
    require_tensors,
)
from moellava.model.language_model.configuration_llama_moe import LlamaMoeConfig
from moellava.model.language_model.modeling_llama_moe import (
    LlamaMoeForCausalLM,
    with_weights,
)
from moellava.storage.errors import reading
from moellava.storage.sources import HubKeywords, HubOptions

logger = logging.getLogger(__name__)

# The multimodal parts of a MoE-LLaVA checkpoint; this module reads its language model.
NOT_LANGUAGE_MODEL = (
    "model.mm_projector.",
    "model.image_tower.",
    "model.video_tower.",
    "model.vision_tower.",
)
LANGUAGE_FIELDS = {field.name for field in fields(LlamaConfig)} | {"rope_theta", "rope_scaling"}


@dataclass(frozen=True, kw_only=True)
class Layout:
    """Where a checkpoint keeps what; `{layer}` and `{expert}` are numbers."""

    block: str  # prefix of one sparse layer's MLP
    expert: str  # of one expert, within the block
    parts: dict[str, str]  # our gate_proj, up_proj, down_proj to its names
    router: str
    config: Callable[[CheckpointReader], LlamaMoeConfig]
    meta_expert: str = ""


def import_mixture(
    source: str | os.PathLike[str],
    *,
    dtype: torch.dtype | None = None,
    device: torch.device | str | None = None,
    **hub: Unpack[HubKeywords],
) -> LlamaMoeForCausalLM:
    """The language model of a published mixture, in evaluation mode.

    Args:
        source, dtype, **hub: as in `imported_state_dict`, and so are the errors.
        device: where the model goes; `None` leaves it on the CPU.
    """
    config, state_dict = imported_state_dict(source, dtype=dtype, **hub)
    dtype = dtype or state_dict["model.embed_tokens.weight"].dtype
    return with_weights(str(source), config, state_dict, dtype=dtype, device=device)


def imported_state_dict(
    source: str | os.PathLike[str],
    *,
    dtype: torch.dtype | None = None,
    **hub: Unpack[HubKeywords],
) -> tuple[LlamaMoeConfig, dict[str, Tensor]]:
    """The config and the weights of a published mixture as `LlamaMoeForCausalLM` has them.

    It reads `mixtral` (without a sliding window) and `moe_llava_llama`: MoE-LLaVA, and Med-MoE with
    its meta expert and router bias. DeepSpeed's gate weighs the one expert of top-1 by its raw
    probability and normalises top-2, so `norm_topk_prob` is k > 1 there; its noise and its dropped
    tokens are left out.

    Args:
        source: folder or hub id.
        dtype: of the weights but the router's, which is float32; `None` keeps the file's.
        **hub: as in transformers' `from_pretrained`.

    Raises:
        OSError: if there is no such checkpoint.
        ValueError: for another architecture (named), options that LlamaMoe lacks, or tensors that
            do not fit.
    """
    config, tensors = imported_tensors(source, dtype=dtype, **hub)
    return config, dict(tensors)


def imported_tensors(
    source: str | os.PathLike[str],
    *,
    dtype: torch.dtype | None = None,
    **hub: Unpack[HubKeywords],
) -> tuple[LlamaMoeConfig, Iterator[tuple[str, Tensor]]]:
    """As `imported_state_dict`, one tensor at a time."""
    require_float(dtype)
    reader = CheckpointReader(source, HubOptions(**hub))
    if reader.model_type not in LAYOUTS:
        raise _unreadable(reader)
    layout = LAYOUTS[reader.model_type]
    with reading(reader.source, "a mixture's config"):
        config = layout.config(reader)
    shapes = reader.expected_shapes(config)
    require_tensors(reader, _source_shapes(layout, config, shapes), may_have=_may_have(shapes))
    ignored = [name for name in reader.names() if name.startswith(NOT_LANGUAGE_MODEL)]
    if ignored:
        logger.info("%s: %d tensors of the image side are not read", reader.source, len(ignored))
    return config, _converted(reader, layout, config, shapes, dtype)


def _converted(
    reader: CheckpointReader,
    layout: Layout,
    config: LlamaMoeConfig,
    shapes: dict[str, Shape],
    dtype: torch.dtype | None,
) -> Iterator[tuple[str, Tensor]]:
    for name, shape in shapes.items():
        sources = _sources(layout, config, name)
        if ".mlp.experts." not in name:
            yield name, reader.read(sources[0], torch.float32 if ".mlp.gate." in name else dtype)
            continue
        fused = torch.empty(shape, dtype=dtype or reader.read(sources[0]).dtype)
        per_expert = len(sources) // config.num_experts  # gate and up, or down alone
        for index, source in enumerate(sources):
            target = fused[index // per_expert].chunk(per_expert)[index % per_expert]
            target.copy_(reader.read(source))
        yield name, fused


def _sources(layout: Layout, config: LlamaMoeConfig, name: str) -> list[str]:
    """The names in the checkpoint that make up one of ours, expert after expert."""
    prefix, _, suffix = name.partition(".mlp.")
    layer = prefix.rpartition(".")[2]
    if not suffix or not config.is_sparse(int(layer)):
        return [name]
    block = layout.block.format(layer=layer)
    kind, _, rest = suffix.partition(".")
    if kind == "gate":
        return [f"{block}.{layout.router}.{rest}"]
    if kind == "meta_expert":
        return [f"{block}.{layout.meta_expert}.{rest}"]
    ours = ("gate_proj", "up_proj") if rest == "gate_up_proj" else ("down_proj",)
    return [
        f"{block}.{layout.expert.format(expert=expert)}.{layout.parts[part]}.weight"
        for expert in range(config.num_experts)
        for part in ours
    ]


def _source_shapes(
    layout: Layout, config: LlamaMoeConfig, shapes: dict[str, Shape]
) -> dict[str, Shape]:
    expected = {}
    for name, shape in shapes.items():
        if ".mlp.experts." in name:
            rows = config.expert_width if name.endswith("gate_up_proj") else config.hidden_size
            shape = (rows, shape[2])
        expected.update(dict.fromkeys(_sources(layout, config, name), shape))
    return expected


def _may_have(shapes: dict[str, Shape]) -> Callable[[str], bool]:
    harmless = is_harmless(shapes)
    return lambda name: name.startswith(NOT_LANGUAGE_MODEL) or harmless(name)


def _mixtral_config(reader: CheckpointReader) -> LlamaMoeConfig:
    config = reader.config()
    if config.sliding_window is not None:
        raise ValueError(
            f"{reader.source} has sliding_window={config.sliding_window}, but Llama's attention "
            "sees everything, so the logits would differ beyond that length. Load it with "
            "transformers' MixtralForCausalLM."
        )
    if config.router_jitter_noise:
        logger.warning(
            "%s: router_jitter_noise=%g is not applied in training",
            reader.source,
            config.router_jitter_noise,
        )
    dense = {name: value for name, value in config.to_dict().items() if name in LANGUAGE_FIELDS}
    return LlamaMoeConfig(
        **dense,
        moe_layers="dense",
        num_experts=config.num_local_experts,
        num_experts_per_tok=config.num_experts_per_tok,
        output_router_logits=config.output_router_logits,
        # Mixtral's loss counts every one of the k assignments
        router_aux_loss_coef=config.router_aux_loss_coef * config.num_experts_per_tok,
    )


def _moe_llava_config(reader: CheckpointReader) -> LlamaMoeConfig:
    found = reader.config_dict
    moe = found.get("moe") or {}
    required = ("moe_layers_idx", "num_experts", "top_k_experts")
    missing = [key for key in required if not moe.get(key)]
    if missing:
        raise ValueError(
            f"The config of {reader.source} lacks {missing} under 'moe'. Use the one of stage III."
        )
    if len(set(moe["num_experts"])) != 1:
        raise ValueError(
            f"{reader.source} has {moe['num_experts']} experts in its layers, but LlamaMoe has one "
            "number for all."
        )
    if moe.get("use_residual"):
        raise ValueError(
            f"{reader.source} has use_residual=True (residual experts), which LlamaMoe lacks."
        )
    names = reader.names()
    layers = list(moe["moe_layers_idx"])
    return LlamaMoeConfig(
        **{name: value for name, value in found.items() if name in LANGUAGE_FIELDS},
        moe_layers=layers,
        num_experts=moe["num_experts"][0],
        num_experts_per_tok=moe["top_k_experts"],
        norm_topk_prob=moe["top_k_experts"] > 1,
        meta_expert=any(".mlp.meta_moe." in name for name in names),
        router_bias=any(name.endswith(".deepspeed_moe.gate.wg.bias") for name in names),
        # MoE-LLaVA sums its loss over the layers; ours is their mean
        router_aux_loss_coef=moe.get("router_aux_loss_coef", 0.01) * len(layers),
    )


def _unreadable(reader: CheckpointReader) -> ValueError:
    other = {"moe_llava_phi": "Phi", "moe_llava_stablelm": "StableLM", "moe_llava_qwen": "Qwen"}
    known_other = other.get(reader.model_type)
    if known_other:
        return ValueError(
            f"{reader.source} is a MoE-LLaVA on {known_other} ({reader.model_type!r}); only those "
            "on a Llama ('moe_llava_llama') can be read so far."
        )
    error = unknown_name("mixture architecture", reader.model_type, LAYOUTS)
    return ValueError(f"{reader.source}: {error}")


_LLAMA_PARTS = {part: part for part in ("gate_proj", "up_proj", "down_proj")}

LAYOUTS = {
    "mixtral": Layout(
        block="model.layers.{layer}.block_sparse_moe",
        expert="experts.{expert}",
        parts={"gate_proj": "w1", "up_proj": "w3", "down_proj": "w2"},
        router="gate",
        config=_mixtral_config,
    ),
    "moe_llava_llama": Layout(
        block="model.layers.{layer}.mlp",
        expert="deepspeed_moe.experts.deepspeed_experts.{expert}",
        parts=_LLAMA_PARTS,
        router="deepspeed_moe.gate.wg",
        config=_moe_llava_config,
        meta_expert="meta_moe",
    ),
}
