"""The parts of a joined model, by the names of its weights: `PARTS`, `FINEST`, `part_of`.

`weight_names` gives the names, those of weights in 8 or 4 bits included, which are no parameters.

PEFT's names, which have more words before and after, are of the same parts.
"""

import re

from torch import nn

from moellava.model.quantization import quantized_weights

# What a recipe may name, as patterns of weights' names.
PARTS = {
    "vision_tower": r"(^|\.)model\.vision_tower\.",
    "projector": r"(^|\.)model\.(multi_modal_projector\.|image_newline$)",
    "language_model": r"(^|\.)(model\.language_model|lm_head)\.",
    "embeddings": r"(^|\.)(model\.language_model\.embed_tokens|lm_head)\.",
    "attention": r"\blanguage_model\.layers\.\d+\.self_attn\.",
    "mlp": r"\blanguage_model\..*\.mlp\.[a-z_]*proj\.",
    "experts": r"\blanguage_model\..*\.mlp\.experts\.",
    "meta_expert": r"\blanguage_model\..*\.mlp\.meta_expert\.",
    "router": r"\blanguage_model\..*\.mlp\.gate\.",
    "norms": r"\blanguage_model\.(layers\.\d+\.)?[^.]*norm[^.]*\.",
}
WHOLE_LANGUAGE_MODEL = "language_model"
# No weight is of two of these.
FINEST = tuple(part for part in PARTS if part != WHOLE_LANGUAGE_MODEL)


def part_of(name: str) -> str:
    """The finest part that a weight is of; `language_model` for what has no name of its own there.

    Raises:
        ValueError: if it is of no part.
    """
    for part in (*FINEST, WHOLE_LANGUAGE_MODEL):
        if re.search(PARTS[part], name):
            return part
    raise ValueError(f"{name!r} is a weight of no part. Known: {', '.join(PARTS)}.")


def is_of(name: str, part: str) -> bool:
    """Whether a weight is of a part, which may be a whole one."""
    return re.search(PARTS[part], name) is not None


def weight_names(model: nn.Module) -> list[str]:
    """Names of all weights, rounded ones included."""
    return [
        *(name for name, _ in model.named_parameters()),
        *(name for name, _ in quantized_weights(model)),
    ]
