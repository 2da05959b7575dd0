"""A published mixture of experts in, our layout out: Mixtral's, MoE-LLaVA's and Med-MoE's Llama-based checkpoints.

E experts, I expert width, H hidden width.

Public names: `import_mixture`, `imported_state_dict`, `LAYOUTS`.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor
from transformers import LlamaConfig

from moellava.messages import unknown_name
from moellava.model.language_model.checkpoint import CheckpointReader, causal_lm_shapes, is_harmless
from moellava.model.language_model.configuration_llama_moe import LlamaMoeConfig
from moellava.model.language_model.modeling_llama_moe import LlamaMoeForCausalLM, require_exact

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
    """Where a checkpoint keeps what: `{layer}` and `{expert}` are numbers, a block's names start at its layer."""

    block: str  # of one sparse layer
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
    **hub: Any,
) -> LlamaMoeForCausalLM:
    """The language model of a published mixture, in evaluation mode.

    Args:
        device: where the model goes; `None` leaves it on the CPU.
        source, dtype, **hub: as `imported_state_dict`.

    Raises: as `imported_state_dict`.
    """
    config, state_dict = imported_state_dict(source, dtype=dtype, **hub)
    dtype = dtype or state_dict["model.embed_tokens.weight"].dtype
    loaded: Any = LlamaMoeForCausalLM.from_pretrained(
        None, config=config, state_dict=state_dict, dtype=dtype, output_loading_info=True
    )
    model, info = loaded
    require_exact(info)
    return model if device is None else model.to(device)


def imported_state_dict(
    source: str | os.PathLike[str],
    *,
    dtype: torch.dtype | None = None,
    **hub: Any,
) -> tuple[LlamaMoeConfig, dict[str, Tensor]]:
    """The config and the weights of a published mixture as `LlamaMoeForCausalLM` has them.

    Read are `mixtral` (without a sliding window) and `moe_llava_llama`: MoE-LLaVA, and Med-MoE with its meta expert
    and router bias. DeepSpeed's gate weighs the one expert of top-1 by its raw probability and normalises top-2, so
    `norm_topk_prob` is k > 1 there; its noise and its dropped tokens are left out.

    Args:
        source: folder or hub id.
        dtype: of the weights but the router's, which is float32; `None` keeps the file's.
        **hub: `revision`, `cache_dir`, `local_files_only`, `token`, as in transformers' `from_pretrained`.

    Raises:
        OSError: if there is no such checkpoint.
        ValueError: for another architecture (named), options that LlamaMoe lacks, or tensors that do not fit.
    """
    reader = CheckpointReader(source, **hub)
    if reader.model_type not in LAYOUTS:
        raise _unreadable(reader)
    layout = LAYOUTS[reader.model_type]
    config = layout.config(reader)
    shapes = causal_lm_shapes(config)
    reader.require(_source_shapes(layout, config, shapes), may_have=_may_have(shapes))
    ignored = [name for name in reader.names() if name.startswith(NOT_LANGUAGE_MODEL)]
    if ignored:
        logger.info("%s: %d tensors of the image side are not read", reader.source, len(ignored))
    return config, dict(_converted(reader, layout, config, shapes, dtype))


def _converted(
    reader: CheckpointReader,
    layout: Layout,
    config: LlamaMoeConfig,
    shapes: dict[str, tuple[int, ...]],
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
    layout: Layout, config: LlamaMoeConfig, shapes: dict[str, tuple[int, ...]]
) -> dict[str, tuple[int, ...]]:
    expected = {}
    for name, shape in shapes.items():
        if ".mlp.experts." in name:
            rows = config.expert_width if name.endswith("gate_up_proj") else config.hidden_size
            shape = (rows, shape[2])
        expected.update(dict.fromkeys(_sources(layout, config, name), shape))
    return expected


def _may_have(shapes: dict[str, tuple[int, ...]]) -> Callable[[str], bool]:
    harmless = is_harmless({"lm_head.weight"} - shapes.keys())
    return lambda name: name.startswith(NOT_LANGUAGE_MODEL) or harmless(name)


def _mixtral_config(reader: CheckpointReader) -> LlamaMoeConfig:
    config = reader.config()
    if config.sliding_window is not None:
        raise ValueError(
            f"{reader.source} has sliding_window={config.sliding_window}, but Llama's attention sees everything, so "
            "the logits would differ beyond that length. Load it with transformers' MixtralForCausalLM."
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
            f"The config of {reader.source} lacks {missing} under 'moe'. Take the one of stage III."
        )
    if len(set(moe["num_experts"])) != 1:
        raise ValueError(
            f"{reader.source} has {moe['num_experts']} experts in its layers, but LlamaMoe has one number for all."
        )
    if moe.get("use_residual"):
        raise ValueError(
            f"{reader.source} has use_residual=True (residual experts), which LlamaMoe does not have."
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
        # MoE-LLaVA sums its loss over the layers, ours is their mean
        router_aux_loss_coef=moe.get("router_aux_loss_coef", 0.01) * len(layers),
    )


def _unreadable(reader: CheckpointReader) -> ValueError:
    other = {"moe_llava_phi": "Phi", "moe_llava_stablelm": "StableLM", "moe_llava_qwen": "Qwen"}
    known_other = other.get(reader.model_type)
    if known_other:
        return ValueError(
            f"{reader.source} is a MoE-LLaVA on {known_other} ({reader.model_type!r}); only those on a Llama "
            "('moe_llava_llama') can be read so far."
        )
    return unknown_name("mixture architecture", reader.model_type, LAYOUTS)


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
