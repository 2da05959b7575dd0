"""A dense Llama checkpoint in, a mixture of experts with the same function out (sparse upcycling, arXiv 2212.05055).

E experts, I the dense MLP's width, g = I / expert width pieces per MLP, H hidden width.

Public names, in reading order: `moe_config_from_dense`, `upcycle`, `upcycled_state_dict`, `to_dense`,
`layers_with_differing_experts`, `upcycled_tensors`.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator, Mapping
from dataclasses import fields
from typing import Any, Literal

import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedConfig
from transformers.utils.logging import tqdm

from moellava.messages import unknown_name
from moellava.model.language_model.checkpoint import (
    CheckpointReader,
    causal_lm_shapes,
    is_harmless,
    is_mixture,
)
from moellava.model.language_model.configuration_llama_moe import LlamaMoeConfig
from moellava.model.language_model.modeling_llama_moe import LlamaMoeForCausalLM, require_exact
from moellava.model.language_model.router_weights import RouterSource, read_router
from moellava.storage.sources import split_hub_keywords

logger = logging.getLogger(__name__)

MOE_OPTIONS = tuple(
    sorted(
        {field.name for field in fields(LlamaMoeConfig)}
        - {field.name for field in fields(LlamaConfig)}
    )
)
# How the weights are made, and no part of the config: keywords of `upcycled_state_dict`.
UPCYCLING_OPTIONS = ("noise", "keep_function", "router")
# What the function of a Llama depends on, beside its weights.
FUNCTION_FIELDS = (
    "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "head_dim",
    "hidden_act", "rms_norm_eps", "rope_parameters", "attention_bias", "mlp_bias", "tie_word_embeddings",
)  # fmt: skip


def moe_config_from_dense(dense_config: PreTrainedConfig, **moe_options: Any) -> LlamaMoeConfig:
    """The config of the mixture that a dense Llama becomes: all its fields, and the options of `LlamaMoeConfig`.

    Raises:
        ValueError: for another architecture than Llama, an option that `LlamaMoeConfig` does not have, or an
            impossible value.
    """
    require_llama(dense_config.model_type, "The config")
    for name in moe_options:
        if name not in MOE_OPTIONS:
            raise unknown_name("mixture option", name, (*MOE_OPTIONS, *UPCYCLING_OPTIONS))
    dense = dense_config.to_dict()
    for name in ("model_type", "architectures", "transformers_version"):
        dense.pop(name, None)
    return LlamaMoeConfig(**dense, **moe_options)


def split_moe_options(
    moe_config: Mapping[str, Any] | Literal[True],
) -> tuple[dict[str, Any], dict[str, Any]]:
    """`moe_config` of `load_pretrained_model` → options of `moe_config_from_dense`, and of `upcycled_state_dict`."""
    options = {} if moe_config is True else dict(moe_config)
    upcycling = {key: options.pop(key) for key in UPCYCLING_OPTIONS if key in options}
    return options, upcycling


def upcycle(
    source: str | os.PathLike[str],
    *,
    dtype: torch.dtype | None = None,
    device: torch.device | str | None = None,
    seed: int = 0,
    noise: float = 0.0,
    keep_function: bool = True,
    router: RouterSource | None = None,
    **options: Any,
) -> LlamaMoeForCausalLM:
    """A mixture whose logits equal the dense checkpoint's.

    Args:
        source, dtype, seed, noise, keep_function, router: as `upcycled_state_dict`.
        device: where the model goes; `None` leaves it on the CPU.
        **options: fields of `LlamaMoeConfig`, such as `moe_layers` or `num_experts`; `revision`, `cache_dir`, ... as
            `upcycled_state_dict` has them.

    Returns:
        The model in evaluation mode.

    Raises: as `upcycled_state_dict` and `moe_config_from_dense`.
    """
    hub, options = split_hub_keywords(options)
    reader = CheckpointReader(source, **hub.keywords)
    require_dense_llama(reader)
    config = moe_config_from_dense(reader.config(), **options)
    dtype = dtype or reader.dtype()
    state_dict = dict(
        upcycled_tensors(
            reader,
            config,
            dtype=dtype,
            seed=seed,
            noise=noise,
            keep_function=keep_function,
            router=router,
        )
    )
    model, info = LlamaMoeForCausalLM.from_pretrained(
        None, config=config, state_dict=state_dict, dtype=dtype, output_loading_info=True
    )
    require_exact(info)
    return model if device is None else model.to(device)


def upcycled_state_dict(
    source: str | os.PathLike[str],
    config: LlamaMoeConfig,
    *,
    dtype: torch.dtype | None = None,
    seed: int = 0,
    noise: float = 0.0,
    keep_function: bool = True,
    router: RouterSource | None = None,
    **hub: Any,
) -> dict[str, Tensor]:
    """The weights of `LlamaMoeForCausalLM(config)`, every expert a copy of the dense MLP, or of a piece of it.

    With `moe_intermediate_size` = I/g, expert e holds piece e mod g of the MLP, the router's rows come in groups of g
    equal ones, so that a token gets all pieces of one copy, and `down_proj` is scaled by g (virtual groups, arXiv
    2410.07524). Then `num_experts` and `num_experts_per_tok` must be multiples of g; with k = g a token costs what
    the dense MLP costs.

    With `meta_expert` the meta expert is the copy, and the routed experts start with `down_proj` = 0, so that they
    add nothing at first.

    Args:
        source: folder or hub id of a Llama checkpoint: safetensors or a weights-only pickle, in one file or shards.
        config: from `moe_config_from_dense`.
        dtype: of the weights but the router's, which is float32; `None` keeps the file's.
        seed: of the router's weights, normal with std `initializer_range`, and of the noise.
        noise: standard deviation of the noise added to every expert's weights, relative to theirs.
        keep_function: False copies the MLP into every expert whatever that does to the logits, as Med-MoE does.
        router: weights of one trained router for every sparse layer, in place of random ones; see `read_router`.
        **hub: `revision`, `cache_dir`, `local_files_only`, `token`, as in transformers' `from_pretrained`.

    Returns:
        name to tensor; without `lm_head.weight` where it is tied.

    Raises:
        OSError: if there is no such checkpoint.
        ValueError: if the source is no dense Llama, its tensors do not fit, `config` describes another Llama, or the
            options cannot keep the function.
    """
    reader = CheckpointReader(source, **hub)
    require_dense_llama(reader)
    _require_same_llama(reader, config)
    return dict(
        upcycled_tensors(
            reader,
            config,
            dtype=dtype,
            seed=seed,
            noise=noise,
            keep_function=keep_function,
            router=router,
        )
    )


def layers_with_differing_experts(model: LlamaMoeForCausalLM) -> list[int]:
    """The sparse layers whose experts are no longer copies of one dense MLP."""
    pieces = num_pieces(model.config)
    differing = []
    for layer_idx in model.config.moe_layer_indices:
        block = model.model.layers[layer_idx].mlp
        grouped = [
            parameter.detach().unflatten(0, (-1, pieces))
            for parameter in (block.experts.gate_up_proj, block.experts.down_proj)
        ]
        tied = block.gate.weight.detach().unflatten(
            0, (-1, pieces)
        )  # (E/g, g, H): pieces of a copy go together
        if any(bool((copies != copies[:1]).any()) for copies in grouped) or bool(
            (tied != tied[:, :1]).any()
        ):
            differing.append(layer_idx)
    return differing


def to_dense(model: LlamaMoeForCausalLM) -> LlamaForCausalLM:
    """The dense Llama that the mixture still equals, as an independent model.

    Raises:
        ValueError: if the experts of some layer differ, naming the layers, or if the mixture cannot equal one MLP.
    """
    config = model.config
    if not _is_convex(config):
        raise ValueError(
            "A mixture with a meta expert, or with raw probabilities that do not sum to 1 "
            "(norm_topk_prob=False), is no dense MLP even while its experts are equal."
        )
    differing = layers_with_differing_experts(model)
    if differing:
        raise ValueError(
            f"The experts of layers {differing} differ, so no dense model computes the same. Keep the mixture."
        )
    dense = {name: value for name, value in config.to_dict().items() if name not in MOE_OPTIONS}
    for name in ("model_type", "architectures"):
        dense.pop(name, None)
    tied = model.all_tied_weights_keys
    state_dict = {
        name: value.detach().clone()
        for name, value in model.state_dict().items()
        if name not in tied and ".mlp.experts." not in name and ".mlp.gate." not in name
    }
    pieces = num_pieces(config)
    for layer_idx in config.moe_layer_indices:
        experts = model.model.layers[layer_idx].mlp.experts
        gate, up = experts.gate_up_proj.detach()[:pieces].chunk(2, dim=1)  # (g, I/g, H) each
        prefix = f"model.layers.{layer_idx}.mlp"
        state_dict[f"{prefix}.gate_proj.weight"] = gate.flatten(0, 1).clone()
        state_dict[f"{prefix}.up_proj.weight"] = up.flatten(0, 1).clone()
        down = torch.cat(list(experts.down_proj.detach()[:pieces]), dim=1)  # (H, I)
        state_dict[f"{prefix}.down_proj.weight"] = down / pieces
    result: Any = LlamaForCausalLM.from_pretrained(
        None,
        config=LlamaConfig(**dense),
        state_dict=state_dict,
        dtype=model.dtype,
        output_loading_info=True,
    )
    dense_model, info = result
    require_exact(info)
    return dense_model


def num_pieces(config: LlamaMoeConfig) -> int:
    """g, the experts that together hold one dense MLP.

    Raises:
        ValueError: if `moe_intermediate_size` does not divide `intermediate_size`, or g the expert counts.
    """
    dense_width, width = config.intermediate_size, config.expert_width
    if dense_width % width != 0:
        raise ValueError(
            f"moe_intermediate_size={width} does not divide the dense MLP's intermediate_size={dense_width}, so it "
            "cannot be split into experts. Leave it out, or choose a divisor."
        )
    pieces = dense_width // width
    for name in ("num_experts", "num_experts_per_tok"):
        if getattr(config, name) % pieces != 0:
            raise ValueError(
                f"{name}={getattr(config, name)} is no multiple of {pieces}, the number of experts of width {width} "
                f"that make up one dense MLP of width {dense_width}. Use multiples of {pieces}, such as "
                f"num_experts={4 * pieces}, num_experts_per_tok={pieces}."
            )
    return pieces


def require_llama(model_type: str, what: str) -> None:
    if model_type == LlamaMoeConfig.model_type:
        raise ValueError(
            f"{what} is a mixture of experts already ({model_type!r}). "
            "Load it with LlamaMoeForCausalLM.from_pretrained."
        )
    if model_type != LlamaConfig.model_type:
        raise ValueError(
            f"{what} has model_type {model_type!r}, but only dense models of model_type 'llama' can become a LlamaMoe: "
            "TinyLlama, SmolLM2, Llama 2 and 3 and their kin. load_pretrained_model(..., moe_config=False) joins it "
            "dense."
        )


def require_dense_llama(reader: CheckpointReader) -> None:
    """Raise `ValueError` unless the checkpoint is a dense Llama with all its tensors in their shapes."""
    require_llama(reader.model_type, f"The checkpoint {reader.source}")
    if is_mixture(reader):
        raise ValueError(
            f"{reader.source} calls itself a dense 'llama' but holds experts. Read it with "
            "moellava.model.language_model.import_mixture(source)."
        )
    shapes = causal_lm_shapes(reader.config())
    reader.require(shapes, may_have=is_harmless({"lm_head.weight"} - shapes.keys()))


def _require_same_llama(reader: CheckpointReader, config: LlamaMoeConfig) -> None:
    dense_config = reader.config()
    for name in (*FUNCTION_FIELDS, "vocab_size"):
        found, wanted = getattr(dense_config, name), getattr(config, name)
        if found != wanted:
            raise ValueError(
                f"The config says {name}={wanted}, but {reader.source} has {found}. "
                "Make the config with moe_config_from_dense(dense_config, ...)."
            )


def _is_convex(config: LlamaMoeConfig) -> bool:
    """Whether the weights of a token's experts always sum to 1 and nothing is added to their sum."""
    sums_to_one = config.norm_topk_prob or config.num_experts_per_tok == config.num_experts
    return sums_to_one and not config.meta_expert


def upcycled_tensors(
    reader: CheckpointReader,
    config: LlamaMoeConfig,
    *,
    dtype: torch.dtype | None,
    seed: int = 0,
    noise: float = 0.0,
    keep_function: bool = True,
    router: RouterSource | None = None,
) -> Iterator[tuple[str, Tensor]]:
    """Every (name, tensor) of the mixture, one dense tensor in memory at a time."""
    if noise < 0:
        raise ValueError(
            f"noise is {noise}, but a standard deviation cannot be negative. Use 0 for exact copies."
        )
    if keep_function and not _is_convex(config) and not config.meta_expert:
        raise ValueError(
            "With norm_topk_prob=False the chosen experts' weights do not sum to 1, so copies of the dense MLP change "
            "the logits. Use norm_topk_prob=True, add meta_expert=True, or accept it with keep_function=False."
        )
    router_generator = torch.Generator().manual_seed(seed)
    noise_generator = torch.Generator().manual_seed(seed + 1)
    shared_router = None if router is None else read_router(router, config)
    num_copied = 0
    for name in tqdm(sorted(causal_lm_shapes(reader.config())), desc="Upcycling weights"):
        prefix, _, suffix = name.partition(".mlp.")
        if not suffix or not config.is_sparse(int(prefix.rpartition(".")[2])):
            yield name, reader.read(name, dtype)
        elif (
            suffix == "gate_proj.weight"
        ):  # the first of the three, by name the second; up and down are read with it
            block = f"{prefix}.mlp"
            yield from _experts(reader, block, config, dtype, noise, noise_generator, keep_function)
            if config.meta_expert:
                for part in ("gate_proj", "up_proj", "down_proj"):
                    yield (
                        f"{block}.meta_expert.{part}.weight",
                        reader.read(f"{block}.{part}.weight", dtype),
                    )
            for part, value in (shared_router or _fresh_router(config, router_generator)).items():
                yield f"{block}.gate.{part}", value.clone()
            num_copied += 1
    logger.info(
        "%s: %d of %d layers upcycled to %d experts, top-%d, router %s",
        reader.source,
        num_copied,
        config.num_hidden_layers,
        config.num_experts,
        config.num_experts_per_tok,
        "random" if shared_router is None else "given",
    )


def _experts(
    reader: CheckpointReader,
    block: str,
    config: LlamaMoeConfig,
    dtype: torch.dtype | None,
    noise: float,
    generator: torch.Generator,
    keep_function: bool,
) -> Iterator[tuple[str, Tensor]]:
    pieces, width = num_pieces(config), config.expert_width
    gate = reader.read(f"{block}.gate_proj.weight")  # (I, H)
    dtype = dtype or gate.dtype
    gate_up_proj = torch.empty(config.num_experts, 2 * width, config.hidden_size, dtype=dtype)
    down_proj = torch.empty(config.num_experts, config.hidden_size, width, dtype=dtype)
    for offset, dense in ((0, gate), (width, reader.read(f"{block}.up_proj.weight"))):
        for expert in range(config.num_experts):
            piece = dense[(expert % pieces) * width :][:width]
            gate_up_proj[expert, offset : offset + width] = _noised(piece, noise, generator)
    del gate, dense, piece  # before the next tensor is read: the memory bound counts
    down = reader.read(f"{block}.down_proj.weight")  # (H, I)
    for expert in range(config.num_experts):
        piece = down[:, (expert % pieces) * width :][:, :width]
        down_proj[expert] = _noised(piece, noise, generator)
    if pieces > 1:
        down_proj *= pieces  # a copy's weight is shared by its g pieces
    if config.meta_expert and keep_function:
        down_proj.zero_()
    yield f"{block}.experts.gate_up_proj", gate_up_proj
    yield f"{block}.experts.down_proj", down_proj


def _noised(weight: Tensor, noise: float, generator: torch.Generator) -> Tensor:
    if noise == 0:
        return weight
    exact = weight.float()
    return exact + noise * exact.std() * torch.randn(weight.shape, generator=generator)


def _fresh_router(config: LlamaMoeConfig, generator: torch.Generator) -> dict[str, Tensor]:
    pieces = num_pieces(config)
    rows = torch.empty(config.num_experts // pieces, config.hidden_size)
    rows.normal_(0.0, config.initializer_range, generator=generator)
    router = {"weight": rows.repeat_interleave(pieces, dim=0)}  # (E, H) float32
    if config.router_bias:
        router["bias"] = torch.zeros(config.num_experts)
    return router
