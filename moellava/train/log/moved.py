"""How far each part of a model moved in a run: `num_learning`, `movement`, `movement_text`."""

import logging
from collections.abc import Iterable, Mapping, Sequence
from typing import TypedDict

import torch
from torch import Tensor, nn

from moellava.train.parts import part_of

logger = logging.getLogger(__name__)


class Moved(TypedDict):
    """One part of a model, before and after a run."""

    part: str  # of `moellava.train.parts.FINEST`
    weights: int  # numbers in it
    learning: int  # numbers that were trained for it, adapters included
    moved: float  # |after - before| / |before|, Euclidean norms over all its weights


def num_learning(model: nn.Module) -> dict[str, int]:
    """How many numbers learn for each part, adapters included; frozen parts are left out."""
    counts: dict[str, int] = {}
    for name, weight in model.named_parameters():
        if weight.requires_grad:
            counts[part_of(name)] = counts.get(part_of(name), 0) + weight.numel()
    return counts


def movement(
    before: Iterable[tuple[str, Tensor]],
    after: Mapping[str, Tensor],
    learning: Mapping[str, int],
) -> list[Moved]:
    """The parts in the order of `before`; exactly 0 for what is bit for bit the same.

    A part that learned and is the same is named in a warning.

    Args:
        before, after: weights by name, on any device; computed in float64.
        learning: of `num_learning`.

    Raises:
        ValueError: if a weight of `before` is not in `after`, or has another shape there.
    """
    sums: dict[str, list[float]] = {}
    for name, old in before:
        if name not in after or after[name].shape != old.shape:
            raise ValueError(f"{name} {tuple(old.shape)} is not in the trained model.")
        was, now = (weight.detach().cpu().double() for weight in (old, after[name]))
        total = sums.setdefault(part_of(name), [0.0, 0.0, 0.0, 0.0])
        for place, value in enumerate((was, now, now - was)):
            total[place] += float(torch.sum(value * value))
        total[3] += old.numel()
    found = [
        Moved(
            part=part,
            weights=int(size),
            learning=learning.get(part, 0),
            # A part that began at zero has moved as far as it is long now.
            moved=(difference / (was or now)) ** 0.5 if difference else 0.0,
        )
        for part, (was, now, difference, size) in sums.items()
    ]
    if still := [row["part"] for row in found if row["learning"] and not row["moved"]]:
        logger.warning(
            "%s learned, and is bit for bit what it was: the learning rate is too small for its "
            "precision, or no gradient reached it",
            ", ".join(still),
        )
    return found


def movement_text(rows: Sequence[Moved]) -> str:
    """A table for the terminal."""
    lines = [f"{'part':<16} {'weights':>15} {'learning':>15}  moved"]
    lines += [
        f"{row['part']:<16} {row['weights']:>15,} {row['learning']:>15,}  "
        + (f"{row['moved']:.2e}" if row["moved"] else "0")
        for row in rows
    ]
    return "\n".join(lines)
