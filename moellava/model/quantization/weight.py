"""A rounded weight and its products: `QuantizedWeight`.

E experts, N rows, K width, G a group's width, T tokens.
"""

import logging
from collections.abc import Callable
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moellava.model.quantization.packed import (
    ROWS,
    has_int8_product,
    int4_product,
    int8_product,
    multiplied_as,
    packed_form,
)
from moellava.model.quantization.rounding import Rounded, Scheme, restored, round_weight

logger = logging.getLogger(__name__)

# Up to so many tokens torch's packed product is faster than unpacking the weight first. Measured
# for 11264 x 2048 by tests/benchmarks/quantization.py.
PACKED_TOKENS = {8: 96, 4: 192}


class QuantizedWeight(nn.Module):
    """A weight (N, K), or E of them (E, N, K), in 8 or 4 bits.

    Files hold it as `Rounded` says, whatever the machine. Where torch has a packed product for 4
    bits, memory holds it in the order of that product instead, and no second time.

    Args:
        dtype: of scales and zeros, and of what the weight stands for.
    """

    values: Tensor
    scales: Tensor  # packed: ([E,] K / G, N, 2), scales and zeros beside each other
    zeros: Tensor | None

    def __init__(
        self,
        shape: tuple[int, ...],
        scheme: Scheme,
        *,
        dtype: torch.dtype,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__()
        self.shape, self.scheme = torch.Size(shape), scheme
        self.is_packed = False
        values, scales = scheme.shapes(tuple(shape))
        is_int8 = scheme.bits == 8
        kind = torch.int8 if is_int8 else torch.uint8
        self.register_buffer("values", torch.empty(values, dtype=kind, device=device))
        self.register_buffer("scales", torch.empty(scales, dtype=dtype, device=device))
        zeros = None if is_int8 else torch.empty(scales, dtype=dtype, device=device)
        self.register_buffer("zeros", zeros)

    @classmethod
    def of(cls, weight: Tensor, scheme: Scheme) -> "QuantizedWeight":
        """The rounded form of a weight, on its device."""
        rounded = round_weight(weight, scheme)
        made = cls(tuple(weight.shape), scheme, dtype=weight.dtype, device="meta")
        made.values, made.scales, made.zeros = rounded
        return made

    @property
    def dtype(self) -> torch.dtype:
        return self.scales.dtype

    @property
    def device(self) -> torch.device:
        return self.values.device

    def numel(self) -> int:
        """How many numbers the weight has."""
        return self.shape.numel()

    def product(self, inputs: Tensor, expert: int | None = None) -> Tensor:
        """(T, K) to (T, N), in the dtype of `inputs`.

        Args:
            expert: whose weight, of E.
        """
        if torch.is_grad_enabled() and inputs.requires_grad:
            product: Callable[..., Tensor] = _Product.apply
            return product(inputs, self, expert)
        return self._product(inputs, expert)

    def restored(self, expert: int | None = None, dtype: torch.dtype | None = None) -> Tensor:
        """The weight as ordinary numbers, (N, K), or (E, N, K) without an `expert`."""
        dtype = dtype or self.dtype
        if not self.is_packed:
            return restored(self._part(expert), dtype)
        if expert is None and len(self.shape) == 3:
            return torch.stack([self.restored(e, dtype) for e in range(self.shape[0])])
        form = packed_form()
        assert form is not None
        values, scales, _ = self._part(expert)
        columns = form.columns(values, torch.uint8).to(dtype)  # (K, N)
        groups = columns.view(len(scales), -1, columns.shape[1])
        scale, zero = scales.to(dtype)[:, None].unbind(-1)
        groups.sub_(8).mul_(scale).add_(zero)
        return columns.t()

    def pack(self) -> None:
        """Bring the weight into the order of torch's product, if there is one for it."""
        form = packed_form() if self._can_pack() else None
        if form is None or self.is_packed:
            return
        with torch.inference_mode(False), torch.no_grad():
            self._reorder(form.pack)
            assert self.zeros is not None
            pairs = torch.stack((self.scales, self.zeros), dim=-1)  # (..., N, K / G, 2)
            self.scales, self.zeros = pairs.transpose(-3, -2).contiguous(), None
        self.is_packed = True

    def unpack(self) -> None:
        """Bring the weight back into the order of files."""
        if not self.is_packed:
            return
        form = packed_form()
        assert form is not None
        with torch.inference_mode(False), torch.no_grad():
            self._reorder(form.unpack)
            self.scales, self.zeros = self._split_scales()
        self.is_packed = False

    def extra_repr(self) -> str:
        return f"{tuple(self.shape)}, {self.scheme}"

    def _part(self, expert: int | None) -> Rounded:
        if expert is None:
            return Rounded(self.values, self.scales, self.zeros)
        zeros = None if self.zeros is None else self.zeros[expert]
        return Rounded(self.values[expert], self.scales[expert], zeros)

    def _product(self, inputs: Tensor, expert: int | None) -> Tensor:
        self.pack()
        values, scales, _ = self._part(expert)
        if len(inputs) <= PACKED_TOKENS[self.scheme.bits] and self._has_product(inputs):
            if self.scheme.bits == 8:
                return int8_product(inputs, values, scales)
            return int4_product(inputs, values, scales)
        dtype = multiplied_as(inputs.dtype, inputs.device)
        if self.scheme.bits == 8:  # whole numbers up to 127 are exact in bfloat16
            product = F.linear(inputs.to(dtype), values.to(dtype)) * scales.to(dtype)
        else:
            product = F.linear(inputs.to(dtype), self.restored(expert, dtype))
        return product.to(inputs.dtype)

    def _has_product(self, inputs: Tensor) -> bool:
        """Whether torch can multiply these, with a warning if it cannot."""
        if inputs.device.type != "cpu" or inputs.dtype != torch.bfloat16:
            warn_unpacked(f"{inputs.dtype} on {inputs.device.type}".removeprefix("torch."))
        elif self.scheme.bits == 8 and not has_int8_product():
            warn_unpacked("8 bits in this torch (torch._weight_int8pack_mm)")
        elif self.scheme.bits == 4 and packed_form() is None:
            warn_unpacked("4 bits in this torch (torch.ops.aten._weight_int4pack_mm_for_cpu)")
        elif (self.scheme.bits == 4 and not self.is_packed) or self.shape[-1] % 32:
            warn_unpacked(f"weights of {self.shape[-2]} rows and {self.shape[-1]} columns")
        else:
            return True
        return False

    def _can_pack(self) -> bool:
        is_fitting = self.scheme.bits == 4 and self.shape[-2] % ROWS == 0
        return is_fitting and self.device.type == "cpu" and self.dtype == torch.bfloat16

    def _reorder(self, order: Callable[[Tensor], Tensor]) -> None:
        """Matrix by matrix, in the same memory unless that is a file's."""
        if len(self.shape) == 2:
            self.values = order(self.values)
            return
        reordered = torch.empty_like(self.values)
        for target, source in zip(reordered, self.values, strict=True):
            target.copy_(order(source))
        self.values = reordered

    def _split_scales(self) -> tuple[Tensor, Tensor]:
        """Packed scales and zeros, each in the order of files."""
        scales, zeros = self.scales.transpose(-3, -2).unbind(-1)
        return scales.contiguous(), zeros.contiguous()

    def _save_to_state_dict(
        self, destination: dict[str, Any], prefix: str, keep_vars: bool
    ) -> None:
        """In the order of files, as a copy if memory has another."""
        if not self.is_packed:
            super()._save_to_state_dict(destination, prefix, keep_vars)
            return
        form = packed_form()
        assert form is not None
        matrices = self.values if len(self.shape) == 3 else self.values[None]
        values = torch.stack([form.unpack(matrix) for matrix in matrices])
        scales, zeros = self._split_scales()
        whole = {"values": values.view_as(self.values), "scales": scales, "zeros": zeros}
        destination.update({prefix + name: tensor for name, tensor in whole.items()})

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        self.unpack()
        super()._load_from_state_dict(*args, **kwargs)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "QuantizedWeight":
        if self.is_packed and fn(self.scales) is not self.scales:  # the order is this device's
            self.unpack()
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        return self


class _Product(torch.autograd.Function):
    """The product with a gradient for its inputs; the weight has none."""

    @staticmethod
    def forward(ctx: Any, inputs: Tensor, weight: QuantizedWeight, expert: int | None) -> Tensor:
        ctx.weight, ctx.expert = weight, expert
        return weight._product(inputs, expert)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        (gradient,) = gradients
        dtype = multiplied_as(gradient.dtype, gradient.device)
        weight = ctx.weight.restored(ctx.expert, dtype)
        return (gradient.to(dtype) @ weight).to(gradient.dtype), None, None


@cache
def warn_unpacked(what: str) -> None:
    logger.warning(
        "torch has no packed product for %s: each weight is unpacked for each product, which is "
        "slow. On a CPU, load the model with dtype='bfloat16'.",
        what,
    )
