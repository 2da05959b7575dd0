"""A language model of ours, in and out of a joined one → Mixtral's own layout, with equal logits.

    E experts, k experts per token, I expert width, H hidden width

export_mixtral      writes the folder
inexact_reasons     why a model has no exact form there

A dense layer becomes E equal experts under a router of zeros: the k normalised weights sum to 1.
Narrower MLPs are filled up with zeros, which add nothing.
"""

import os
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from math import prod
from pathlib import Path
from typing import NamedTuple

import torch
from huggingface_hub import split_torch_state_dict_into_shards
from safetensors.torch import save_file
from torch import Tensor
from transformers import (
    AutoTokenizer,
    LlamaConfig,
    MixtralConfig,
    PreTrainedConfig,
    PreTrainedTokenizerBase,
)
from typing_extensions import Unpack

from moellava.model.checkpoint.configs import GENERATION_FILE, read_generation_config
from moellava.model.checkpoint.difference import is_trainable_folder
from moellava.model.configuration_moellava import MoeLlavaConfig
from moellava.model.language_model import LlamaMoeConfig
from moellava.model.language_model.checkpoint import (
    CheckpointReader,
    Shape,
    causal_lm_shapes,
    require_tensors,
)
from moellava.model.modeling_moellava import joined_name
from moellava.model.processing_moellava import MoeLlavaProcessor
from moellava.storage.sources import HubKeywords, HubOptions, find_file, parse_source
from moellava.storage.writing import replacing, write_json, write_text

# Fields that both configs have under one name and that mean the same in both.
COMMON_FIELDS = (
    "vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads",
    "head_dim", "hidden_act", "max_position_embeddings", "initializer_range", "rms_norm_eps",
    "use_cache", "pad_token_id", "bos_token_id", "eos_token_id", "attention_dropout",
    "rope_parameters",
)  # fmt: skip
# An MLP's weights by the names of Mixtral's papers: down(silu(gate(x)) * up(x)).
PARTS = {"gate_proj": "w1", "up_proj": "w3", "down_proj": "w2"}


@dataclass(frozen=True, kw_only=True)
class MixtralExport:
    """What was written, and what it costs."""

    folder: Path
    config: MixtralConfig
    dense_layers: tuple[int, ...]  # that became equal experts
    parameters_before: int  # of the language model
    parameters: int


class Piece(NamedTuple):
    """One tensor of the export: its name and shape, and how it is made of one of ours."""

    name: str
    shape: Shape
    source: str
    make: Callable[[Tensor], Tensor]


def export_mixtral(
    checkpoint: str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    max_shard_size: int | str = "2GB",
    **hub: Unpack[HubKeywords],
) -> MixtralExport:
    """Write the language model of a saved model in the layout of Mistral's Mixtral.

    Its config, tokenizer and chat template go along, so that the folder is a text model by itself.
    Weights keep their dtypes, routers are float32. Memory is that of one shard.

    Args:
        checkpoint: folder or hub id of a joined model, or of a `LlamaMoeForCausalLM`.
        out: a folder that does not exist or is empty.
        max_shard_size: of one file of weights, as `save_pretrained` takes it.

    Raises:
        ValueError: if the model has no exact form there, with all reasons; or if weights are
            missing or misshapen.
        OSError: if there is no such checkpoint, or `out` holds something.
    """
    out = Path(out).expanduser()
    if is_trainable_folder(checkpoint):
        raise ValueError(
            f"{checkpoint} holds a difference from its base, not a whole model. Save the whole one "
            "first: load_pretrained_model(folder), then save_pretrained of model and processor."
        )
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise FileExistsError(f"{out} is there already; give another folder, or empty it.")
    options = HubOptions(**hub)
    reader = CheckpointReader(checkpoint, options)
    config, rename = _language_config(reader)
    if reasons := inexact_reasons(config):
        raise ValueError(
            f"{reader.source} has no exact form in Mixtral's layout: {'; '.join(reasons)}. Serve "
            "it with vLLM or moellava serve instead (docs/serving.md)."
        )
    shapes = causal_lm_shapes(config)
    require_tensors(
        reader,
        {rename(name): shape for name, shape in shapes.items()},
        may_have=lambda name: True,  # the image side, which stays with us
    )
    target = mixtral_config(config)
    target.dtype = reader.read(rename("model.embed_tokens.weight")).dtype
    pieces = list(_pieces(config, target, shapes))
    tokenizer = _tokenizer(reader, options)
    out.mkdir(parents=True, exist_ok=True)
    _write_weights(pieces, lambda name: reader.read(rename(name)), out, max_shard_size)
    tokenizer.save_pretrained(out)
    generation = find_file(
        parse_source(checkpoint, options), GENERATION_FILE, download=True, required=False
    )
    if generation is not None:
        write_text(
            out / GENERATION_FILE, read_generation_config(generation).to_json_string() + "\n"
        )
    write_text(out / "config.json", target.to_json_string())
    return MixtralExport(
        folder=out,
        config=target,
        dense_layers=tuple(_dense_layers(config)),
        parameters_before=sum(prod(shape) for shape in shapes.values()),
        parameters=sum(prod(piece.shape) for piece in pieces),
    )


def inexact_reasons(config: PreTrainedConfig) -> list[str]:
    """Why a language model computes something that Mixtral's layout cannot say; [] if it can."""
    if type(config) not in (LlamaMoeConfig, LlamaConfig):
        return [f"its language model is a {config.model_type!r}, and Mixtral is a Llama"]
    unlike = {
        "attention_bias": "its attention has biases (attention_bias=True)",
        "mlp_bias": "its MLPs have biases (mlp_bias=True)",
        "meta_expert": "it has an expert that is always on (meta_expert=True)",
        "router_bias": "its routers have biases (router_bias=True)",
    }
    reasons = [reason for name, reason in unlike.items() if getattr(config, name, False)]
    if not getattr(config, "norm_topk_prob", True):
        reasons.append(
            "it weighs experts by raw probabilities (norm_topk_prob=False), and Mixtral's sum to 1"
        )
    if config.hidden_act != "silu":
        reasons.append(f"its activation is {config.hidden_act!r}, and Mixtral's is 'silu'")
    return reasons


def mixtral_config(config: LlamaConfig) -> MixtralConfig:
    """The config of a mixture, or of a dense Llama, as Mixtral's; a dense one has one expert."""
    top_k = getattr(config, "num_experts_per_tok", 1)
    return MixtralConfig(
        **{name: getattr(config, name) for name in COMMON_FIELDS},
        intermediate_size=_expert_width(config),
        num_local_experts=getattr(config, "num_experts", 1),
        num_experts_per_tok=top_k,
        tie_word_embeddings=config.tie_word_embeddings,
        # Mixtral's loss counts each of the k assignments.
        router_aux_loss_coef=getattr(config, "router_aux_loss_coef", 0.0) / top_k,
        architectures=["MixtralForCausalLM"],
    )


def _language_config(reader: CheckpointReader) -> tuple[LlamaConfig, Callable[[str], str]]:
    """The language model's config, and how its weights are called in the checkpoint."""
    config = reader.config()
    if getattr(config, "quantization_config", None) is not None:
        raise ValueError(
            f"{reader.source} holds quantised weights, and the export would have to be of whole "
            "ones. Export the checkpoint that was quantised."
        )
    if isinstance(config, MoeLlavaConfig):
        language: LlamaConfig = config.text_config
        language.tie_word_embeddings = config.tie_word_embeddings
        return language, joined_name
    if not isinstance(config, LlamaConfig):
        raise ValueError(
            f"{reader.source} is a {reader.model_type!r} checkpoint; expected a model that "
            "save_pretrained of moellava wrote."
        )
    return config, str


def _tokenizer(reader: CheckpointReader, options: HubOptions) -> PreTrainedTokenizerBase:
    if reader.model_type != MoeLlavaConfig.model_type:
        plain: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(
            reader.source, trust_remote_code=False, **options.keywords
        )
        return plain
    processor = MoeLlavaProcessor.from_pretrained(
        reader.source,
        trust_remote_code=False,
        **options.keywords,  # type: ignore[arg-type]  # a revision may be None
    )
    tokenizer: PreTrainedTokenizerBase = processor.tokenizer
    template = processor.chat_template
    assert isinstance(template, str)  # as our processor is saved
    tokenizer.chat_template = _without_marks(template)
    return tokenizer


def _without_marks(template: str) -> str:
    """A chat template without training's marks, which other Jinja engines do not know.

    Comments in their place keep the trimming of white space.
    """
    return re.sub(r"\{%(-?)\s*(?:end)?generation\s*(-?)%\}", r"{#\1 \2#}", template)


def _dense_layers(config: LlamaConfig) -> list[int]:
    sparse = config.moe_layer_indices if isinstance(config, LlamaMoeConfig) else []
    return [layer for layer in range(config.num_hidden_layers) if layer not in sparse]


def _expert_width(config: LlamaConfig) -> int:
    """Mixtral has one width for all: the widest MLP's."""
    widths = [config.intermediate_size] if _dense_layers(config) else []
    if isinstance(config, LlamaMoeConfig):
        widths.append(config.expert_width)
    return max(widths)


def _pieces(
    config: LlamaConfig, target: MixtralConfig, shapes: dict[str, Shape]
) -> Iterator[Piece]:
    width, hidden = target.intermediate_size, target.hidden_size
    shape_of = {"w1": (width, hidden), "w3": (width, hidden), "w2": (hidden, width)}
    for name, shape in shapes.items():
        prefix, _, part = name.partition(".mlp.")
        if not part:
            yield Piece(name, shape, name, lambda tensor: tensor)
            continue
        block = f"{prefix}.block_sparse_moe"
        if part == "gate.weight":
            yield Piece(f"{block}.gate.weight", shape, name, lambda tensor: tensor)
            continue
        if part == "gate_proj.weight":  # of a dense layer, which has no router
            routed = (target.num_local_experts, hidden)
            make_router = partial(Tensor.new_zeros, size=routed)
            yield Piece(f"{block}.gate.weight", routed, name, make_router)
        for expert in range(target.num_local_experts):
            for own, cut in _cuts(part, expert):
                make = partial(_filled_up, shape=shape_of[own], cut=cut)
                yield Piece(f"{block}.experts.{expert}.{own}.weight", shape_of[own], name, make)


def _cuts(part: str, expert: int) -> Iterable[tuple[str, Callable[[Tensor], Tensor]]]:
    """Mixtral's names for what one weight of an MLP of ours holds of one expert."""
    if part == "experts.gate_up_proj":  # (E, 2I, H)
        return (
            ("w1", lambda fused: fused[expert].chunk(2)[0]),
            ("w3", lambda fused: fused[expert].chunk(2)[1]),
        )
    if part == "experts.down_proj":  # (E, H, I)
        return (("w2", lambda fused: fused[expert]),)
    return ((PARTS[part.partition(".")[0]], lambda dense: dense),)


def _filled_up(tensor: Tensor, *, shape: Shape, cut: Callable[[Tensor], Tensor]) -> Tensor:
    found = cut(tensor)
    if tuple(found.shape) == shape:
        return found
    filled = found.new_zeros(shape)
    filled[: found.shape[0], : found.shape[1]] = found
    return filled


def _write_weights(
    pieces: list[Piece], read: Callable[[str], Tensor], out: Path, max_shard_size: int | str
) -> None:
    """Write the files of weights, one after the other, and their index."""
    by_name = {piece.name: piece for piece in pieces}
    dtypes = {source: read(source).dtype for source in {piece.source for piece in pieces}}
    sizes = {
        piece.name: torch.empty(piece.shape, dtype=dtypes[piece.source], device="meta")
        for piece in pieces
    }
    split = split_torch_state_dict_into_shards(sizes, max_shard_size=max_shard_size)
    for filename, names in split.filename_to_tensors.items():
        tensors = {}
        for name in names:
            piece = by_name[name]
            # A copy: safetensors refuses views, and equal experts share their memory.
            tensors[name] = piece.make(read(piece.source)).clone(
                memory_format=torch.contiguous_format
            )
        with replacing(out / filename) as part:
            save_file(tensors, part, metadata={"format": "pt"})
    if split.is_sharded:
        index = {"metadata": split.metadata, "weight_map": split.tensor_to_filename}
        write_json(out / "model.safetensors.index.json", index)
