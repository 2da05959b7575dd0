"""In which arithmetic a tower runs: `float32`, `bfloat16`, or what is fastest on the device.

choose_precision   a word → a dtype and the reason
in_precision       the tower in that dtype
"""

import copy
import logging
from typing import NamedTuple, TypeVar

import torch
from torch import nn

from moellava.messages import unknown_name

logger = logging.getLogger(__name__)

PRECISIONS = ("auto", "float32", "bfloat16")
# What a CPU is said to have that multiplies bfloat16 by itself (x86's two, Arm's two).
_CPU_MULTIPLIES_BFLOAT16 = ("amx_bf16", "avx512_bf16", "bf16", "sve_bf16")

EncoderT = TypeVar("EncoderT", bound=nn.Module)


class Choice(NamedTuple):
    """A dtype, and why it is this one."""

    dtype: torch.dtype
    reason: str


def choose_precision(precision: str, device: torch.device) -> Choice:
    """The dtype that a word of `PRECISIONS` means on a device.

    `auto` is bfloat16 where the hardware multiplies it: a CPU without that is slower in bfloat16
    than in float32.

    Raises:
        ValueError: for another word.
    """
    if precision not in PRECISIONS:
        raise unknown_name("precision", precision, PRECISIONS)
    if precision != "auto":
        return Choice(getattr(torch, precision), "as asked for")
    if device.type == "cuda":
        if torch.cuda.is_bf16_supported(including_emulation=False):
            return Choice(torch.bfloat16, "this GPU multiplies bfloat16")
        return Choice(torch.float32, "this GPU does not multiply bfloat16")
    if device.type != "cpu":
        return Choice(torch.float32, f"nothing is known about bfloat16 on {device.type}")
    if not hasattr(torch.cpu, "get_capabilities"):
        return Choice(torch.float32, f"torch {torch.__version__} does not say what this CPU has")
    capabilities = torch.cpu.get_capabilities()
    found = [name for name in _CPU_MULTIPLIES_BFLOAT16 if capabilities.get(name)]
    if found:
        return Choice(torch.bfloat16, f"this CPU multiplies bfloat16 ({', '.join(found)})")
    return Choice(torch.float32, "this CPU does not multiply bfloat16")


def in_precision(encoder: EncoderT, precision: str | None) -> EncoderT:
    """The encoder itself if it has this precision, or if None is given; otherwise a copy.

    Raises:
        ValueError: for a word that is not in `PRECISIONS`.
    """
    if precision is None:
        return encoder
    weight = next(encoder.parameters())
    dtype, reason = choose_precision(precision, weight.device)
    logger.info("the tower runs in %s: %s", str(dtype).removeprefix("torch."), reason)
    return encoder if weight.dtype == dtype else copy.deepcopy(encoder).to(dtype)
