"""A dense Llama in, a mixture with the same function out (sparse upcycling, arXiv 2212.05055).

E experts, I the dense MLP's width, g = I / expert width pieces per MLP, H hidden width.

moe_config_from_dense           the config of the mixture
upcycle, upcycled_state_dict    its model, its weights
to_dense                        back, as long as the experts are equal
Upcycling, upcycled_tensors     the same for a model that is already open
"""

import logging
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields
from typing import Any, Literal, TypedDict, cast

import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedConfig
from transformers.utils.logging import tqdm
from typing_extensions import Unpack

from moellava.messages import unknown_name
from moellava.model.language_model.checkpoint import (
    CheckpointReader,
    TensorReader,
    causal_lm_shapes,
    is_harmless,
    is_mixture,
    require_float,
    require_tensors,
)
from moellava.model.language_model.configuration_llama_moe import LlamaMoeConfig
from moellava.model.language_model.modeling_llama_moe import LlamaMoeForCausalLM, with_weights
from moellava.model.language_model.moe import LlamaMoeSparseBlock
from moellava.model.language_model.router_weights import RouterSource, read_router, router_facts
from moellava.model.quantization import require_ordinary
from moellava.storage.errors import reading
from moellava.storage.sources import HubKeywords, HubOptions, split_hub_keywords
from moellava.storage.weights import require_loaded

logger = logging.getLogger(__name__)

MOE_OPTIONS = tuple(
    sorted(
        {field.name for field in fields(LlamaMoeConfig)}
        - {field.name for field in fields(LlamaConfig)}
    )
)
# What the function of a Llama depends on, besides its weights.
FUNCTION_FIELDS = (
    "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
    "num_key_value_heads", "head_dim", "hidden_act", "rms_norm_eps", "rope_parameters",
    "attention_bias", "mlp_bias", "tie_word_embeddings",
)  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Upcycling:
    """How a mixture's weights are made from a dense model's; not part of its config.

    Args:
        seed: of the router's weights, normal with std `initializer_range`, and of the noise.
        noise: standard deviation of the noise added to every expert's weights, relative to theirs.
        keep_function: False copies the MLP into every expert whatever that does to the logits, as
            Med-MoE does.
        router: weights of one trained router for every sparse layer, in place of random ones; see
            `read_router`.

    Raises:
        ValueError: for a noise that is not a standard deviation.
    """

    seed: int = 0
    noise: float = 0.0
    keep_function: bool = True
    router: RouterSource | None = None

    def __post_init__(self) -> None:
        if not 0 <= self.noise < float("inf"):  # NaN is not
            raise ValueError(
                f"noise is {self.noise}, but a standard deviation is 0 or a positive number. "
                "Use 0 for exact copies."
            )

    def labelled(self, moe_options: Mapping[str, object]) -> dict[str, object]:
        """The options of the config, with the labels of the experts that the router's file has."""
        labels = router_facts(self.router).labels
        return ({} if labels is None else {"expert_labels": labels}) | dict(moe_options)


class UpcyclingKeywords(TypedDict, total=False):
    """The fields of `Upcycling` that may be given among the options of a mixture."""

    noise: float
    keep_function: bool
    router: RouterSource | None


UPCYCLING_OPTIONS = tuple(UpcyclingKeywords.__annotations__)


def moe_config_from_dense(dense_config: PreTrainedConfig, **moe_options: object) -> LlamaMoeConfig:
    """The config of the mixture that a dense Llama becomes.

    Args:
        **moe_options: the fields that `LlamaMoeConfig` adds to a Llama's.

    Raises:
        ValueError: for an architecture other than Llama, an option that `LlamaMoeConfig` does not
            have, or an impossible value.
    """
    require_llama(dense_config.model_type, "The config")
    for name in moe_options:
        if name not in MOE_OPTIONS:
            raise unknown_name("mixture option", name, (*MOE_OPTIONS, *UPCYCLING_OPTIONS))
    dense = dense_config.to_dict()
    for name in ("model_type", "architectures", "transformers_version"):
        dense.pop(name, None)
    with reading(dense_config.name_or_path or "the dense config", "a Llama's config"):
        LlamaMoeConfig(**dense)  # what the file says, told apart from what the caller asks for
    return LlamaMoeConfig(**(dense | moe_options))


def split_moe_options(
    moe_config: Mapping[str, object] | Literal[True],
) -> tuple[dict[str, object], UpcyclingKeywords]:
    """`moe_config` of `load_pretrained_model`: options of the config, and those of `Upcycling`."""
    given = {} if moe_config is True else dict(moe_config)
    options = {name: value for name, value in given.items() if name not in UPCYCLING_OPTIONS}
    upcycling = {name: given[name] for name in UPCYCLING_OPTIONS if name in given}
    return options, cast(UpcyclingKeywords, upcycling)


def upcycle(
    source: str | os.PathLike[str],
    *,
    dtype: torch.dtype | None = None,
    device: torch.device | str | None = None,
    seed: int = 0,
    noise: float = 0.0,
    keep_function: bool = True,
    router: RouterSource | None = None,
    **options: object,
) -> LlamaMoeForCausalLM:
    """A mixture whose logits equal the dense checkpoint's.

    Args:
        source, dtype, seed, noise, keep_function, router: as in `upcycled_state_dict`.
        device: where the model goes; `None` leaves it on the CPU.
        **options: fields of `LlamaMoeConfig`, such as `moe_layers` or `num_experts`; and
            `revision`, `cache_dir`, ... as in transformers' `from_pretrained`.

    Returns:
        The model in evaluation mode.

    Raises:
        OSError, ValueError: as `upcycled_state_dict` and `moe_config_from_dense`.
    """
    upcycling = Upcycling(seed=seed, noise=noise, keep_function=keep_function, router=router)
    hub, options = split_hub_keywords(options)
    reader = CheckpointReader(source, hub)
    require_dense_llama(reader)
    config = moe_config_from_dense(reader.config(), **upcycling.labelled(options))
    dtype = dtype or reader.dtype()
    state_dict = dict(upcycled_tensors(reader, config, upcycling, dtype=dtype))
    where = f"the mixture made of {reader.source}"
    return with_weights(where, config, state_dict, dtype=dtype, device=device)


def upcycled_state_dict(
    source: str | os.PathLike[str],
    config: LlamaMoeConfig,
    *,
    dtype: torch.dtype | None = None,
    seed: int = 0,
    noise: float = 0.0,
    keep_function: bool = True,
    router: RouterSource | None = None,
    **hub: Unpack[HubKeywords],
) -> dict[str, Tensor]:
    """The weights of `LlamaMoeForCausalLM(config)`; every expert copies the dense MLP or a piece.

    With `moe_intermediate_size` = I/g, expert e holds piece e mod g of the MLP, the router's rows
    come in groups of g equal ones, so that a token gets all pieces of one copy, and `down_proj` is
    scaled by g (virtual groups, arXiv 2410.07524). Then `num_experts` and `num_experts_per_tok`
    must be multiples of g; with k = g a token costs what the dense MLP costs.

    With `meta_expert` the meta expert is the copy, and the routed experts start with `down_proj` =
    0, so that they add nothing at first.

    Args:
        source: folder or hub id of a Llama checkpoint: safetensors or a weights-only pickle, in one
            file or shards.
        config: from `moe_config_from_dense`.
        dtype: of the weights except the router's, which is float32; `None` keeps the file's.
        seed, noise, keep_function, router: fields of `Upcycling`.
        **hub: as in transformers' `from_pretrained`.

    Returns:
        name to tensor; without `lm_head.weight` if it is tied.

    Raises:
        OSError: if there is no such checkpoint.
        ValueError: if the source is not a dense Llama, its tensors do not fit, `config` describes
            another Llama, or the options cannot keep the function.
    """
    upcycling = Upcycling(seed=seed, noise=noise, keep_function=keep_function, router=router)
    return dict(upcycled_source(source, config, upcycling, dtype=dtype, **hub))


def upcycled_source(
    source: str | os.PathLike[str],
    config: LlamaMoeConfig,
    upcycling: Upcycling,
    *,
    dtype: torch.dtype | None = None,
    **hub: Unpack[HubKeywords],
) -> Iterator[tuple[str, Tensor]]:
    """As `upcycled_state_dict`, one tensor at a time."""
    reader = CheckpointReader(source, HubOptions(**hub))
    require_dense_llama(reader)
    _require_same_llama(reader, config)
    return upcycled_tensors(reader, config, upcycling, dtype=dtype)


def layers_with_differing_experts(model: LlamaMoeForCausalLM) -> list[int]:
    """The sparse layers whose experts are no longer copies of one dense MLP."""
    require_ordinary(model, "A comparison of experts")
    pieces = num_pieces(model.config)
    differing = []
    for layer_idx in model.config.moe_layer_indices:
        block = _sparse_block(model, layer_idx)
        experts = [
            _in_groups(weight, pieces)
            for weight in (block.experts.gate_up_proj, block.experts.down_proj)
        ]
        rows = _in_groups(block.gate.weight, pieces)  # (E/g, g, H): a copy's pieces have equal rows
        is_parted = any(bool((copies != copies[:1]).any()) for copies in experts)
        if is_parted or bool((rows != rows[:, :1]).any()):
            differing.append(layer_idx)
    return differing


def to_dense(model: LlamaMoeForCausalLM) -> LlamaForCausalLM:
    """The dense Llama that the mixture still equals, as an independent model.

    Raises:
        ValueError: if the experts of some layer differ, naming the layers, or if the mixture cannot
            equal one MLP.
    """
    config = model.config
    if not _is_convex(config):
        raise ValueError(
            "A mixture with a meta expert, or with raw probabilities that do not sum to 1 "
            "(norm_topk_prob=False), is not a dense MLP even if its experts are equal."
        )
    differing = layers_with_differing_experts(model)
    if differing:
        raise ValueError(
            f"The experts of layers {differing} differ, so no dense model computes the same. "
            "Keep the mixture."
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
        experts = _sparse_block(model, layer_idx).experts
        gate, up = experts.gate_up_proj.detach()[:pieces].chunk(2, dim=1)  # (g, I/g, H) each
        prefix = f"model.layers.{layer_idx}.mlp"
        state_dict[f"{prefix}.gate_proj.weight"] = gate.flatten(0, 1).clone()
        state_dict[f"{prefix}.up_proj.weight"] = up.flatten(0, 1).clone()
        down = torch.cat(list(experts.down_proj.detach()[:pieces]), dim=1)  # (H, I)
        state_dict[f"{prefix}.down_proj.weight"] = down / pieces
    loaded: Any = LlamaForCausalLM.from_pretrained(
        None,
        config=LlamaConfig(**dense),
        state_dict=state_dict,
        dtype=model.dtype,
        output_loading_info=True,
    )
    dense_model, info = loaded
    require_loaded("the dense model", info)
    assert isinstance(dense_model, LlamaForCausalLM)
    return dense_model


def _sparse_block(model: LlamaMoeForCausalLM, layer_idx: int) -> LlamaMoeSparseBlock:
    block = model.model.layers[layer_idx].mlp
    assert isinstance(block, LlamaMoeSparseBlock)
    return block


def _in_groups(weight: Tensor, pieces: int) -> Tensor:
    """(E, ...) to (E/g, g, ...): the experts that hold one copy of the MLP together."""
    return weight.detach().reshape(-1, pieces, *weight.shape[1:])


def num_pieces(config: LlamaMoeConfig) -> int:
    """g, the experts that together hold one dense MLP.

    Raises:
        ValueError: if `moe_intermediate_size` does not divide `intermediate_size`, or g the expert
            counts.
    """
    dense_width, width = config.intermediate_size, config.expert_width
    if dense_width % width != 0:
        raise ValueError(
            f"moe_intermediate_size={width} does not divide the dense MLP's "
            f"intermediate_size={dense_width}, so it cannot be split into experts. "
            "Leave it out, or choose a divisor."
        )
    pieces = dense_width // width
    for name in ("num_experts", "num_experts_per_tok"):
        if getattr(config, name) % pieces != 0:
            raise ValueError(
                f"{name}={getattr(config, name)} is not a multiple of {pieces}, the number of "
                f"experts of width {width} that make up one dense MLP of width {dense_width}. Use "
                f"multiples of {pieces}, such as num_experts={4 * pieces}, "
                f"num_experts_per_tok={pieces}."
            )
    return pieces


def require_llama(model_type: str, what: str) -> None:
    if model_type == LlamaMoeConfig.model_type:
        raise ValueError(
            f"{what} is already a mixture of experts ({model_type!r}). "
            "Load it with LlamaMoeForCausalLM.from_pretrained."
        )
    if model_type != LlamaConfig.model_type:
        raise ValueError(
            f"{what} has model_type {model_type!r}, but only dense models of model_type 'llama' "
            "can become a LlamaMoe, such as TinyLlama, SmolLM2, Llama 2 and 3. "
            "load_pretrained_model(..., moe_config=False) joins it dense."
        )


def require_dense_llama(reader: CheckpointReader) -> None:
    """Raise `ValueError` unless this is a dense Llama with all its tensors in their shapes."""
    require_llama(reader.model_type, f"The checkpoint {reader.source}")
    if is_mixture(reader):
        raise ValueError(
            f"{reader.source} calls itself a dense 'llama' but has experts. Read it with "
            "moellava.model.language_model.import_mixture(source)."
        )
    shapes = reader.expected_shapes()
    require_tensors(reader, shapes, may_have=is_harmless(shapes))


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
    """Whether the weights of a token's experts always sum to 1, and nothing is added to the sum."""
    sums_to_one = config.norm_topk_prob or config.num_experts_per_tok == config.num_experts
    return sums_to_one and not config.meta_expert


def upcycled_tensors(
    reader: TensorReader,
    config: LlamaMoeConfig,
    upcycling: Upcycling,
    *,
    dtype: torch.dtype | None,
) -> Iterator[tuple[str, Tensor]]:
    """Every (name, tensor) of the mixture, one dense tensor in memory at a time."""
    require_float(dtype)
    if upcycling.keep_function and not _is_convex(config) and not config.meta_expert:
        raise ValueError(
            "With norm_topk_prob=False the chosen experts' weights do not sum to 1, so copies of "
            "the dense MLP change the logits. Use norm_topk_prob=True, add meta_expert=True, or "
            "accept it with keep_function=False."
        )
    if config.router_frozen and upcycling.router is None:
        raise ValueError(
            "router_frozen=True keeps the router as it is, but without router=... it is random. "
            "Give the file of a trained router (in a recipe, moe.router: the output_dir of stage "
            "'router'), or leave router_frozen out."
        )
    router_generator = torch.Generator().manual_seed(upcycling.seed)
    noise_generator = torch.Generator().manual_seed(upcycling.seed + 1)
    given = None if upcycling.router is None else read_router(upcycling.router, config)
    # In the order of their names as text, as it always was: a seed keeps its meaning.
    layers = sorted(config.moe_layer_indices, key=str)
    for layer in tqdm(layers, desc="Upcycling weights"):
        block = f"model.layers.{layer}.mlp"
        yield from _experts(reader, block, config, upcycling, dtype, noise_generator)
        if config.meta_expert:
            for part in ("gate_proj.weight", "up_proj.weight", "down_proj.weight"):
                yield f"{block}.meta_expert.{part}", reader.read(f"{block}.{part}", dtype)
        for part, value in (given or _fresh_router(config, router_generator)).items():
            yield f"{block}.gate.{part}", value.clone()
    blocks = tuple(f"model.layers.{layer}.mlp." for layer in layers)
    for name in causal_lm_shapes(reader.config()):
        if not name.startswith(blocks):
            yield name, reader.read(name, dtype)
    logger.info(
        "%s: %d of %d layers upcycled to %d experts, top-%d, router %s",
        reader.source,
        len(layers),
        config.num_hidden_layers,
        config.num_experts,
        config.num_experts_per_tok,
        "random" if given is None else "given",
    )


def _experts(
    reader: TensorReader,
    block: str,
    config: LlamaMoeConfig,
    upcycling: Upcycling,
    dtype: torch.dtype | None,
    generator: torch.Generator,
) -> Iterator[tuple[str, Tensor]]:
    """The experts of one layer, whose dense MLP is read tensor by tensor."""
    pieces, width, noise = num_pieces(config), config.expert_width, upcycling.noise
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
    if config.meta_expert and upcycling.keep_function:
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
