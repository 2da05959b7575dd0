"""transformers' `from_pretrained` for rounded weights: `MoellavaQuantizationConfig`.

It is registered as `quant_method: moellava`.
"""

import copy
import re
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.core_model_loading import ConversionOps
from transformers.quantizers.auto import (
    AUTO_QUANTIZER_MAPPING,
    register_quantization_config,
    register_quantizer,
)
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from moellava.model.quantization.modules import (
    QuantizedExperts,
    QuantizedLinear,
    quantized_weights,
)
from moellava.model.quantization.rounding import GROUP_SIZES, Scheme, round_weight
from moellava.model.quantization.weight import QuantizedWeight

METHOD = "moellava"
# Of the language model alone, alone or in a multimodal model: towers and projectors stay.
_LAYER = r"(model\.)?(language_model\.)?layers\.\d+\."
LINEARS = _LAYER + r"(self_attn\.[qkvo]_proj|mlp\.(meta_expert\.)?(gate|up|down)_proj)\.weight"
EXPERTS = _LAYER + r"mlp\.experts\.(gate_up|down)_proj"
HEAD = r"lm_head\.weight"


class MoellavaQuantizationConfig(QuantizationConfigMixin):
    """What `from_pretrained(..., quantization_config=...)` takes: 8 or 4 bits.

    Rounded are the attention and MLP matrices of the language model's layers and the fused experts.
    Router, norms and embeddings keep their dtype, and so does everything outside the language
    model. Activations are not rounded.

    Args:
        bits: 8, with a scale per row; or 4, with a scale and a zero point per group.
        group_size: 32, 64 or 128 neighbours in a row, for 4 bits; None takes the largest that
            divides every width, and the model's config remembers it.
        head: round `lm_head` as well, unless the model ties it to the embeddings.

    Raises:
        ValueError: for other numbers.
    """

    def __init__(
        self,
        bits: int = 8,
        group_size: int | None = None,
        head: bool = False,
        quant_method: str = METHOD,
    ) -> None:
        Scheme(bits=bits, group_size=group_size or GROUP_SIZES[-1])  # raises
        if quant_method != METHOD:
            raise ValueError(f"quant_method is {quant_method!r}, but this is {METHOD!r}.")
        self.quant_method = quant_method  # type: ignore[assignment]  # transformers lists its own
        self.bits, self.group_size, self.head = bits, group_size, head

    @property
    def scheme(self) -> Scheme:
        return Scheme(bits=self.bits, group_size=self.group_size or GROUP_SIZES[-1])

    def fit(self, model: PreTrainedModel) -> None:
        """Choose the group size for a model, if it is open.

        Raises:
            ValueError: for a model whose weights cannot be rounded so.
        """
        widths = {
            name: value.shape[-1] for name, value in model.named_parameters() if self.rounds(name)
        }
        if not widths:
            raise ValueError(
                f"{type(model).__name__} has no weights that {METHOD!r} rounds: it is for the "
                "Llama and LlamaMoe of moellava's models."
            )
        if self.head and any("lm_head" in name for name in model.all_tied_weights_keys):
            raise ValueError(
                "head=True would round lm_head, but this model ties it to the embeddings. Leave "
                "head out."
            )
        if self.group_size is None and self.bits == 4:
            fitting = [s for s in GROUP_SIZES if not any(w % s for w in widths.values())]
            self.group_size = max(fitting, default=GROUP_SIZES[0])
        for name, width in widths.items():
            self.scheme.require_width(name, width)

    def rounds(self, name: str) -> bool:
        """Whether the weight of this name in a model is rounded."""
        patterns = (LINEARS, EXPERTS, HEAD) if self.head else (LINEARS, EXPERTS)
        return any(re.fullmatch(pattern, name) for pattern in patterns)


class MoellavaQuantizer(HfQuantizer):
    """Rounds weights while they are read, one at a time; opens what was saved rounded."""

    quantization_config: MoellavaQuantizationConfig

    def __init__(self, quantization_config: QuantizationConfigMixin, **kwargs: Any) -> None:
        super().__init__(copy.deepcopy(quantization_config), **kwargs)  # `fit` completes it
        self._misshapen: set[str] = set()

    @property
    def quantized_element_size(self) -> float:
        return self.quantization_config.bits / 8

    def param_needs_quantization(
        self, model: PreTrainedModel, param_name: str, **kwargs: Any
    ) -> bool:
        return self.quantization_config.rounds(param_name) and param_name not in self._misshapen

    def get_quantize_ops(self) -> "_Round":
        return _Round(self.quantization_config.scheme, self._misshapen)

    def _process_model_before_weight_loading(
        self, model: PreTrainedModel, dtype: torch.dtype | None = None, **kwargs: Any
    ) -> PreTrainedModel:
        config = self.quantization_config
        config.fit(model)
        if self.pre_quantized:
            for name, value in list(model.named_parameters()):
                if not config.rounds(name):
                    continue
                held = QuantizedWeight(
                    tuple(value.shape), config.scheme, dtype=dtype or value.dtype, device="meta"
                )
                _hold(model, name, held)
            _replace_modules(model)
        return model

    def _process_model_after_weight_loading(
        self, model: PreTrainedModel, **kwargs: Any
    ) -> PreTrainedModel:
        _replace_modules(model)
        for _, weight in quantized_weights(model):
            weight.pack()
        return model

    def _dequantize(self, model: PreTrainedModel, dtype: object = None) -> PreTrainedModel:
        dtype = dtype if isinstance(dtype, torch.dtype) else model.dtype
        for name, module in list(model.named_modules()):
            if isinstance(module, QuantizedLinear | QuantizedExperts):
                model.set_submodule(name, module.dequantized(dtype))
        return model

    def is_serializable(self) -> bool:
        return True

    @property
    def is_trainable(self) -> bool:
        """By adapters."""
        return True


class _Round(ConversionOps):
    """A weight that was just read becomes a `QuantizedWeight`, and is not kept."""

    def __init__(self, scheme: Scheme, misshapen: set[str]) -> None:
        self._scheme, self._misshapen = scheme, misshapen

    def convert(  # type: ignore[override]  # called with names, and one tensor may stand for a list
        self,
        input_dict: dict[str, Tensor],
        *,
        full_layer_name: str,
        model: PreTrainedModel,
        missing_keys: set[str] | None = None,
        **kwargs: Any,
    ) -> dict[str, Tensor]:
        (value,) = input_dict.values()
        value = value[0] if isinstance(value, list) else value
        if value.shape != model.get_parameter(full_layer_name).shape:
            self._misshapen.add(full_layer_name)  # transformers reports it
            return {full_layer_name: value}
        _hold(model, full_layer_name, QuantizedWeight.of(value, self._scheme))
        if missing_keys is not None:
            missing_keys.discard(full_layer_name)
        return {}


def quantized_tensors(
    tensors: Iterable[tuple[str, Tensor]], config: MoellavaQuantizationConfig
) -> Iterator[tuple[str, Tensor]]:
    """Names and weights as a rounded model's file has them, of those of an ordinary one.

    Each weight is rounded when its turn comes, so that `tensors` may make them one by one.
    """
    for name, tensor in tensors:
        if not config.rounds(name):
            yield name, tensor
            continue
        config.scheme.require_width(name, tensor.shape[-1])
        for part, value in round_weight(tensor, config.scheme)._asdict().items():
            if value is not None:
                yield f"{name}.{part}", value


def _hold(model: nn.Module, name: str, weight: QuantizedWeight) -> None:
    """Put a rounded weight in the place of a parameter."""
    parent, _, attribute = name.rpartition(".")
    module = model.get_submodule(parent)
    del module._parameters[attribute]
    module.add_module(attribute, weight)
    # transformers would draw random values for what it did not fill itself
    module._is_hf_initialized = True  # type: ignore[assignment]


def _replace_modules(model: nn.Module) -> None:
    """Let the modules that hold rounded weights compute with them."""
    for name, module in list(model.named_modules()):
        if isinstance(module, QuantizedLinear | QuantizedExperts):
            continue
        held = {k: v for k, v in module.named_children() if isinstance(v, QuantizedWeight)}
        new: nn.Module
        if isinstance(module, nn.Linear) and "weight" in held:
            new = QuantizedLinear(module, held["weight"])
        elif held.keys() == {"gate_up_proj", "down_proj"}:
            new = QuantizedExperts(module, **held)
        else:
            continue
        for attribute in held:
            del module._modules[attribute]
        new.train(module.training)
        model.set_submodule(name, new)


if METHOD not in AUTO_QUANTIZER_MAPPING:  # not a second time, by a checkpoint's own code
    register_quantization_config(METHOD)(MoellavaQuantizationConfig)
    register_quantizer(METHOD)(MoellavaQuantizer)
