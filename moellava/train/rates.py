"""A learning rate for each part of the model: `require_rates`, `split_by_rate`."""

from collections.abc import Iterable, Mapping

from torch import Tensor, nn
from torch.optim import Optimizer

from moellava.messages import unknown_name
from moellava.train.parts import PARTS, WHOLE_LANGUAGE_MODEL, is_of, part_of


def require_rates(model: nn.Module, rates: Mapping[str, float]) -> None:
    """Raise `ValueError` for a rate of a part that is unknown, or of which nothing learns."""
    learning = [name for name, weight in model.named_parameters() if weight.requires_grad]
    for part in rates:
        if part not in PARTS:
            raise unknown_name("part in optim.rates:", part, PARTS)
        if not any(_rated_by(name, rates) == part for name in learning):
            parts = sorted({part_of(name) for name in learning})
            raise ValueError(
                f"optim.rates has a rate for {part!r}, of which nothing learns by it. What learns: "
                f"{', '.join(parts)}. Add {part!r} to trainable, or leave its rate out."
            )


def split_by_rate(
    optimizer: Optimizer, weights: Iterable[tuple[str, Tensor]], rates: Mapping[str, float]
) -> None:
    """Give the weights of each part their rate, in groups of their own; the others keep theirs.

    Args:
        optimizer: new, without state.
        weights: names and weights of the model.
        rates: the most exact name counts: `attention` before `language_model`.
    """
    rated = {id(weight): _rated_by(name, rates) for name, weight in weights}
    groups = []
    for group in optimizer.param_groups:
        by_part: dict[str | None, list[Tensor]] = {}
        for weight in group["params"]:
            by_part.setdefault(rated[id(weight)], []).append(weight)
        for part, members in by_part.items():
            own = {} if part is None else {"lr": rates[part]}
            groups.append({**group, "params": members, **own})
    optimizer.param_groups[:] = groups


def _rated_by(name: str, rates: Mapping[str, float]) -> str | None:
    """The key of `rates` that a weight's rate stands under."""
    part = part_of(name)
    if part in rates:
        return part
    is_whole = WHOLE_LANGUAGE_MODEL in rates and is_of(name, WHOLE_LANGUAGE_MODEL)
    return WHOLE_LANGUAGE_MODEL if is_whole else None
