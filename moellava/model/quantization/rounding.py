"""Weights to whole numbers and back: 8 bits with a scale per row, 4 bits with one per group.

N rows of a weight, K its width, G a group's width.

Scheme              bits and group
round_weight        a weight to numbers, scales and zeros
restored            and back
"""

from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from moellava.model.quantization.packed import join_columns, split_columns

BITS = (8, 4)
GROUP_SIZES = (32, 64, 128)  # those of torch's product
CHUNK = 512  # rows that are rounded at a time


@dataclass(frozen=True, kw_only=True)
class Scheme:
    """How weights are rounded.

    Args:
        bits: 8 or 4.
        group_size: neighbours in a row that share a scale and a zero point, with 4 bits; rows of 8
            bits have one scale.

    Raises:
        ValueError: for other numbers.
    """

    bits: int = 8
    group_size: int = 128

    def __post_init__(self) -> None:
        if self.bits not in BITS:
            raise ValueError(f"bits is {self.bits!r}. Use 8 or 4.")
        if self.group_size not in GROUP_SIZES:
            raise ValueError(f"group_size is {self.group_size!r}. Use 32, 64 or 128.")

    def require_width(self, name: str, width: int) -> None:
        """Raise `ValueError` if a weight's rows are not whole groups."""
        if self.bits == 4 and width % self.group_size:
            fitting = [str(size) for size in GROUP_SIZES if width % size == 0]
            hint = f"group_size={' or '.join(fitting)}" if fitting else "8 bits"
            raise ValueError(
                f"{name} is {width} wide, which groups of {self.group_size} do not divide. Use "
                f"{hint}."
            )

    def shapes(self, shape: tuple[int, ...]) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """(..., N, K): the shapes of the numbers as they are held, and of scales and zeros."""
        *rows, width = shape
        if self.bits == 8:
            return shape, tuple(rows)
        return (*rows, width // 2), (*rows, width // self.group_size)


class Rounded(NamedTuple):
    """What stands in a file for a weight (..., N, K).

    With 8 bits: `values` (..., N, K) int8 and `scales` (..., N); the weight is values · scales.
    With 4 bits: `values` (..., N, K / 2) uint8, each two numbers q of 0 to 15, the first in the
    lower half; `scales` and `zeros` (..., N, K / G); the weight is (q - 8) · scale + zero.
    """

    values: Tensor
    scales: Tensor
    zeros: Tensor | None = None


def round_weight(weight: Tensor, scheme: Scheme) -> Rounded:
    """Round to nearest; scales and zeros have the weight's dtype.

    Args:
        weight: (..., N, K). Some rows at a time are rounded, in float32, so that little memory is
            taken besides the result's.
    """
    rows = weight.reshape(-1, weight.shape[-1])
    values, scales = scheme.shapes(tuple(weight.shape))
    kind = torch.int8 if scheme.bits == 8 else torch.uint8
    whole = Rounded(
        rows.new_empty(values, dtype=kind),
        rows.new_empty(scales),
        None if scheme.bits == 8 else rows.new_empty(scales),
    )
    round_rows = _in_8_bits if scheme.bits == 8 else partial(_in_4_bits, scheme.group_size)
    for start in range(0, len(rows), CHUNK):
        for target, part in zip(whole, round_rows(rows[start : start + CHUNK]), strict=False):
            assert target is not None
            target.view(len(rows), *part.shape[1:])[start : start + CHUNK] = part
    return whole


def _in_8_bits(rows: Tensor) -> tuple[Tensor, Tensor]:
    exact = rows.float()
    scales = _nonzero(exact.abs().amax(-1).div_(127)).to(rows.dtype)
    numbers = exact.div(scales.float()[:, None]).round_().clamp_(-127, 127)
    return numbers.to(torch.int8), scales


def _in_4_bits(group_size: int, rows: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    groups = rows.float().unflatten(-1, (-1, group_size))
    lowest, highest = groups.aminmax(dim=-1)
    scales = _nonzero((highest - lowest).div_(15)).to(rows.dtype)
    zeros = (lowest + 8 * scales.float()).to(rows.dtype)
    numbers = (groups - zeros.float()[..., None]).div_(scales.float()[..., None])
    numbers = numbers.add_(8).round_().clamp_(0, 15).to(torch.uint8)
    return join_columns(numbers.flatten(-2)), scales, zeros


def restored(rounded: Rounded, dtype: torch.dtype) -> Tensor:
    """(..., N, K): the weight that the numbers stand for."""
    values, scales, zeros = rounded
    if zeros is None:
        return values.to(dtype).mul_(scales.to(dtype)[..., None])
    groups: Tensor = split_columns(values).unflatten(-1, (scales.shape[-1], -1)).to(dtype)
    groups.sub_(8).mul_(scales.to(dtype)[..., None]).add_(zeros.to(dtype)[..., None])
    return groups.flatten(-2)


def _nonzero(scales: Tensor) -> Tensor:
    return torch.where(scales == 0, torch.ones_like(scales), scales)
