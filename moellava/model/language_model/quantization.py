"""8-bit weights by torchao, for `from_pretrained`: experts included, router and head left out.

quantization_config                    what `from_pretrained` takes
weight_bytes, held_bytes, held_dtype   what a model's weights take
is_quantized                           whether a weight is one of torchao's
"""

from __future__ import annotations  # TorchAoConfig is imported for type checking only

from importlib.util import find_spec
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from transformers import PreTrainedModel, TorchAoConfig

# Fully matched names: only the language model's layers, alone or in a multimodal model.
_LAYER = r"re:(model\.)?(language_model\.)?layers\.\d+\."
QUANTIZED_MODULES = (
    _LAYER + r"self_attn\.[qkvo]_proj",
    _LAYER + r"mlp\.(meta_expert\.)?(gate|up|down)_proj",
)
QUANTIZED_PARAMETERS = (_LAYER + r"mlp\.experts\.(gate_up|down)_proj",)


def quantization_config(bits: int = 8) -> TorchAoConfig:
    """The `quantization_config` argument of `from_pretrained` for int8 weights.

    Quantised, with one scale per output row, are the attention and MLP matrices of every layer and
    the fused experts, which bitsandbytes and torchao's defaults skip silently. Embeddings, norms,
    `lm_head` and the router keep their dtype, and so does everything outside the language model.
    Activations are not quantised.

    Raises:
        ImportError: without torchao.
        ValueError: unless `bits` is 8: torchao's 4-bit formats hold matrices only, not fused
            experts, and 4-bit attention beside 16-bit experts would save next to nothing.
    """
    if bits != 8:
        raise ValueError(
            f"bits is {bits}, but only 8 is supported: torchao's 4-bit formats cannot hold the "
            "fused experts, which are most of the weights. Use bits=8."
        )
    if find_spec("torchao") is None:
        raise ImportError("8-bit weights need torchao. Install it: pip install torchao")
    from torchao.quantization import FqnToConfig, Int8WeightOnlyConfig
    from transformers import TorchAoConfig

    int8 = Int8WeightOnlyConfig(version=2)
    names = (*QUANTIZED_MODULES, *QUANTIZED_PARAMETERS)
    return TorchAoConfig(quant_type=FqnToConfig(dict.fromkeys(names, int8)))


def weight_bytes(model: PreTrainedModel) -> int:
    """Bytes of all weights as they are held, scales included; tied weights count once."""
    weights = {id(parameter): parameter for parameter in model.parameters()}
    return sum(held_bytes(weight) for weight in weights.values())


def is_quantized(weight: Tensor) -> bool:
    """Whether a weight is one of torchao's, which only know indexing and matrix products."""
    is_plain = type(weight) in (Tensor, torch.nn.Parameter)
    return not is_plain and hasattr(weight, "dequantize") and hasattr(weight, "qdata")


def held_dtype(weight: Tensor) -> torch.dtype:
    """What the values are stored in; a quantised weight's `dtype` is what it dequantises to."""
    stored: Tensor = getattr(weight, "qdata") if is_quantized(weight) else weight  # noqa: B009
    return stored.dtype


def held_bytes(weight: Tensor) -> int:
    """Bytes of one weight as it is held."""
    parts = [weight]
    if is_quantized(weight):
        lists = ("tensor_data_names", "optional_tensor_data_names")
        names = [name for listed in lists for name in getattr(weight, listed, ())]
        parts = [part for name in names if (part := getattr(weight, name, None)) is not None]
    return sum(part.numel() * part.element_size() for part in parts)
