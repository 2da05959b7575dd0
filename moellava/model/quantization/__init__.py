"""Weights in 8 and 4 bits, registered with transformers as the method `moellava`.

rounding    weights to whole numbers and back: what stands in a file
packed      torch's products of such weights
weight      one weight, its memory and its product
modules     linear layers and experts
quantizer   `from_pretrained` and `save_pretrained`
adapters    PEFT's adapters on such weights
"""

from moellava.model.quantization.modules import (
    num_weights,
    quantized_weights,
    require_ordinary,
    weight_bytes,
    weight_dtypes,
)
from moellava.model.quantization.quantizer import MoellavaQuantizationConfig, quantized_tensors

__all__ = [
    "MoellavaQuantizationConfig",
    "num_weights",
    "quantized_tensors",
    "quantized_weights",
    "require_ordinary",
    "weight_bytes",
    "weight_dtypes",
]
