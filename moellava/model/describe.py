"""What a model is made of, as a table or in log lines, and how many parameters a token meets."""

import logging

from torch import nn
from transformers import PreTrainedModel

from moellava.model.language_model.moe import LlamaMoeSparseBlock
from moellava.model.quantization import num_weights, weight_bytes, weight_dtypes
from moellava.model.tiling import Tiling

logger = logging.getLogger(__name__)


def describe(model: PreTrainedModel) -> str:
    """A table of the parts of a joined model, for `print`.

    Per part: class, output, parameters in all and active per text token, dtype, memory in MiB.
    """
    config = model.config
    text, num_tokens = config.text_config, config.num_image_tokens
    tower, projector = model.model.vision_tower, model.model.multi_modal_projector
    views = "" if config.tiling is None else f", {Tiling(**config.tiling)}"
    parts = [
        (
            "vision_tower",
            tower,
            f"(N={config.vision_config.num_patches}, D={config.vision_config.hidden_size})",
        ),
        ("multi_modal_projector", projector, f"(M={num_tokens}, D={text.hidden_size}){views}"),
        ("language_model", model.model.language_model, f"(T, D={text.hidden_size})"),
        ("lm_head", model.lm_head, f"(T, V={text.vocab_size})"),
    ]
    rows = [["part", "class", "output", "parameters", "active per token", "dtype", "MiB"]]
    for name, module, output in parts:
        rows.append(
            [
                name,
                type(module).__name__,
                output,
                f"{num_weights(module):,}",
                f"{count_active_parameters(module):,}",
                " ".join(sorted(weight_dtypes(module))),
                f"{_mebibytes(module):,.1f}",
            ]
        )
    total, active = num_weights(model), count_active_parameters(model)
    rows.append(
        [
            "all",
            type(model).__name__,
            "",
            f"{total:,}",
            f"{active:,}",
            "",
            f"{_mebibytes(model):,.1f}",
        ]
    )
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = [
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in rows
    ]
    if layers := getattr(text, "moe_layer_indices", None):
        lines.append(
            f"mixtures of {text.num_experts} experts, top-{text.num_experts_per_tok}, in layers "
            f"{layers}"
        )
    if config.tie_word_embeddings:
        lines.append("lm_head shares the token embeddings and is counted once in all")
    return "\n".join(lines)


def log_vision(model: PreTrainedModel) -> None:
    """One INFO line each for tower and projector of an opened model; building logs its own."""
    model.model.vision_tower.log_tower()
    logger.info(
        "projector %s: %d image tokens per view of an image",
        model.config.projector_type,
        model.config.num_image_tokens,
    )


def log_language_model(model: PreTrainedModel) -> None:
    """One INFO line each for the language model and for the size of the whole."""
    text = model.config.text_config
    if layers := getattr(text, "moe_layer_indices", []):
        logger.info(
            "language model %s: %d of %d layers are mixtures of %d experts, top-%d",
            text.model_type,
            len(layers),
            text.num_hidden_layers,
            text.num_experts,
            text.num_experts_per_tok,
        )
    else:
        logger.info("language model %s: dense, %d layers", text.model_type, text.num_hidden_layers)
    logger.info(
        "%d parameters, %d active per token", num_weights(model), count_active_parameters(model)
    )


def count_active_parameters(module: nn.Module) -> int:
    """Parameters that one text token meets: all but the experts that its routers leave out."""
    count = num_weights(module)
    for block in module.modules():
        if isinstance(block, LlamaMoeSparseBlock):
            experts = num_weights(block.experts)
            count -= (
                experts
                // block.experts.num_experts
                * (block.experts.num_experts - block.gate.top_k)
            )
    return count


def _mebibytes(module: nn.Module) -> float:
    return weight_bytes(module) / 2**20
