"""torch's packed products for the CPU: which there are here, and how 4 bits are laid out for them.

N rows of a weight, K its width, G a group's width.

packed_form       how 4-bit weights are laid out for the product, or None where it is missing
has_int8_product  whether the product of 8-bit weights is there
multiplied_as     the dtype that this CPU multiplies fastest
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

ROWS = 64  # what N must divide by: every CPU's kernel works on blocks of 16, 32 or 64 rows
CHUNK = 1024  # rows that are packed at a time: the kernel takes them as int32, eight times as large


@dataclass(frozen=True)
class PackedForm:
    """Blocks of rows, column after column; a byte holds two rows of one column.

    torch does not promise this order: it depends on the CPU, and `packed_form` finds it by trying.
    """

    block: int  # rows
    is_halved: bool  # byte j holds rows j and j + block / 2, or else rows 2 j and 2 j + 1

    def pack(self, values: Tensor) -> Tensor:
        """(N, K / 2) uint8, two columns in a byte, the first in the lower half, to the same shape
        in this form."""
        packed = torch.empty(values.shape, dtype=torch.uint8)
        for start in range(0, len(values), CHUNK):
            rows = slice(start, start + CHUNK)
            packed[rows] = torch.ops.aten._convert_weight_to_int4pack_for_cpu(
                split_columns(values[rows]).int(), 2
            )
        return packed

    def unpack(self, packed: Tensor) -> Tensor:
        """The inverse of `pack`."""
        return join_columns(self.columns(packed, torch.uint8).t()).contiguous()

    def columns(self, packed: Tensor, dtype: torch.dtype) -> Tensor:
        """(K, N) numbers 0 to 15, each column of the weight in one row."""
        num_rows, half_width = packed.shape
        blocks = packed.view(num_rows // self.block, 2 * half_width, self.block // 2)
        blocks = blocks.transpose(0, 1)  # (K, N / block, block / 2)
        shape = (2, self.block // 2) if self.is_halved else (self.block // 2, 2)
        found = packed.new_empty(*blocks.shape[:2], *shape, dtype=dtype)
        low, high = found.unbind(2 if self.is_halved else 3)
        low.copy_(blocks & 15)
        high.copy_(blocks >> 4)
        return found.view(2 * half_width, num_rows)


def split_columns(values: Tensor) -> Tensor:
    """(..., K / 2) uint8, two columns in a byte, to (..., K) numbers 0 to 15."""
    return torch.stack((values & 15, values >> 4), dim=-1).flatten(-2)


def join_columns(numbers: Tensor) -> Tensor:
    """(..., K) numbers 0 to 15 to (..., K / 2) uint8."""
    return numbers[..., ::2] | (numbers[..., 1::2] << 4)


@lru_cache(maxsize=1)
def packed_form() -> PackedForm | None:
    """How this CPU's 4-bit product wants its weights; None if torch lacks it or orders them in a
    way that is not known here."""
    values = torch.randint(256, (2 * ROWS, 32), dtype=torch.uint8, generator=torch.Generator())
    forms = [PackedForm(block, halved) for block in (64, 32, 16) for halved in (True, False)]
    try:
        return next((form for form in forms if _is_exact(form, values)), None)
    except (AttributeError, RuntimeError):  # no such product
        return None


def _is_exact(form: PackedForm, values: Tensor) -> bool:
    """Whether this is the order that torch packs in, and its product gives the weights back."""
    if not torch.equal(form.unpack(form.pack(values)), values):
        return False
    width = 2 * values.shape[1]
    scales = torch.tensor([1.0, 0.0], dtype=torch.bfloat16).repeat(width // 32, len(values), 1)
    unit = torch.eye(width, dtype=torch.bfloat16)
    found = int4_product(unit, form.pack(values), scales)
    return torch.equal((found + 8).t().to(torch.uint8), split_columns(values))


def int4_product(inputs: Tensor, packed: Tensor, scales_and_zeros: Tensor) -> Tensor:
    """(T, K) inputs, (N, K / 2) packed, (K / G, N, 2) to (T, N): the weight is (q - 8) s + z."""
    group_size = inputs.shape[1] // len(scales_and_zeros)
    product: Callable[..., Tensor] = torch.ops.aten._weight_int4pack_mm_for_cpu
    return product(inputs, packed, group_size, scales_and_zeros)


def int8_product(inputs: Tensor, values: Tensor, scales: Tensor) -> Tensor:
    """(T, K) inputs, (N, K) int8, (N,) scales to (T, N)."""
    return torch._weight_int8pack_mm(inputs, values, scales)


@lru_cache(maxsize=1)
def has_int8_product() -> bool:
    values = torch.arange(-64, 64, dtype=torch.int8).reshape(4, 32)
    unit = torch.eye(32, dtype=torch.bfloat16)
    try:
        found = int8_product(unit, values, torch.ones(4, dtype=torch.bfloat16))
    except (AttributeError, RuntimeError):
        return False
    return torch.equal(found.t().to(torch.int8), values)


def multiplied_as(dtype: torch.dtype, device: torch.device) -> torch.dtype:
    """Without AVX-512 a CPU emulates bfloat16: 5 times as slow as float32 at 215 tokens."""
    if device.type == "cpu" and "AVX512" not in torch.backends.cpu.get_cpu_capability():
        return torch.float32
    return dtype
