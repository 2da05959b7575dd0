"""Linear layers and experts with rounded weights: `QuantizedLinear`, `QuantizedExperts`.

N tokens, E experts, I expert width, H hidden width.
"""

from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn

from moellava.model.quantization.weight import QuantizedWeight


class QuantizedLinear(nn.Module):
    """In place of `nn.Linear`: (..., in_features) to (..., out_features).

    Args:
        linear: what it replaces; it gives the bias.
    """

    def __init__(self, linear: nn.Linear, weight: QuantizedWeight) -> None:
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.weight = weight
        self.bias = linear.bias
        self._replaced = (linear,)  # a tuple, so that it is no part of this module

    def dequantized(self, dtype: torch.dtype) -> nn.Linear:
        """The layer that this one replaced, with the rounded weight."""
        (linear,) = self._replaced
        linear.weight, linear.bias = _parameter(self.weight, dtype), self.bias
        return linear

    def forward(self, inputs: Tensor) -> Tensor:
        output = self.weight.product(inputs.reshape(-1, self.in_features))
        if self.bias is not None:
            output = output + self.bias
        return output.view(*inputs.shape[:-1], self.out_features)


class QuantizedExperts(nn.Module):
    """In place of `LlamaMoeExperts`, with the same call; experts are computed one by one."""

    def __init__(
        self, experts: nn.Module, gate_up_proj: QuantizedWeight, down_proj: QuantizedWeight
    ) -> None:
        super().__init__()
        self.num_experts, self.hidden_dim, self.intermediate_dim = down_proj.shape
        self.gate_up_proj, self.down_proj = gate_up_proj, down_proj
        self.act_fn: Callable[[Tensor], Tensor] = experts.act_fn  # type: ignore[assignment]
        self._replaced = (experts,)

    def dequantized(self, dtype: torch.dtype) -> nn.Module:
        """The experts that these replaced, with the rounded weights."""
        (experts,) = self._replaced
        for name in ("gate_up_proj", "down_proj"):
            experts.register_parameter(name, _parameter(getattr(self, name), dtype))
        return experts

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """(N, H) tokens, (N, k) expert indices, (N, k) weights to (N, H)."""
        output = torch.zeros_like(hidden_states, dtype=top_k_weights.dtype)
        if len(hidden_states) == 1:
            for column, expert in enumerate(top_k_index[0].tolist()):
                if expert < self.num_experts:  # otherwise on another rank
                    weight = top_k_weights[:, column]
                    output = output + self._expert(hidden_states, expert) * weight
            return output.to(hidden_states.dtype)
        for expert in range(self.num_experts):
            token, slot = torch.where(top_k_index == expert)
            if token.numel():
                weighted = (
                    self._expert(hidden_states[token], expert) * top_k_weights[token, slot, None]
                )
                output = output.index_add(0, token, weighted.to(output.dtype))
        return output.to(hidden_states.dtype)

    def _expert(self, tokens: Tensor, expert: int) -> Tensor:
        gate, up = self.gate_up_proj.product(tokens, expert).chunk(2, dim=-1)
        return self.down_proj.product(self.act_fn(gate) * up, expert)


def _parameter(weight: QuantizedWeight, dtype: torch.dtype) -> nn.Parameter:
    return nn.Parameter(weight.restored(dtype=torch.float32).to(dtype).contiguous())


def quantized_weights(module: nn.Module) -> Iterator[tuple[str, QuantizedWeight]]:
    """Name and weight of each that is rounded."""
    for name, part in module.named_modules():
        if isinstance(part, QuantizedWeight):
            yield name, part


def require_ordinary(model: nn.Module, what: str) -> None:
    """Raise `ValueError` if weights are rounded, for what needs ordinary ones."""
    if next(quantized_weights(model), None) is not None:
        raise ValueError(
            f"{what} needs ordinary weights, but the model's are rounded to 8 or 4 bits. Open it "
            "without load_in_8bit and load_in_4bit, or call model.dequantize()."
        )


def num_weights(module: nn.Module) -> int:
    """Numbers in all weights, rounded ones included; tied weights count once."""
    rounded = sum(weight.numel() for _, weight in quantized_weights(module))
    return rounded + sum(parameter.numel() for parameter in module.parameters())


def weight_dtypes(module: nn.Module) -> set[str]:
    """What the weights are stored in: names of dtypes, and `int8` or `int4` for rounded ones."""
    plain = {str(parameter.dtype).removeprefix("torch.") for parameter in module.parameters()}
    return plain | {f"int{weight.scheme.bits}" for _, weight in quantized_weights(module)}


def weight_bytes(module: nn.Module) -> int:
    """Bytes of all weights as they are held, scales included; tied weights count once."""
    held: list[Tensor] = list(module.parameters())
    for _, weight in quantized_weights(module):
        held += weight.buffers()
    return sum(part.numel() * part.element_size() for part in held)
