"""Probabilities of closed answers → AUROC and calibration: `probability_scores`."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass

import numpy as np

from moellava.eval.calibration import auroc_interval, calibration
from moellava.eval.predictions import Prediction
from moellava.eval.scorers.choices import option_of_truth
from moellava.eval.scorers.strict import verdict
from moellava.eval.statistics import Resamples

_EVERY = "all"


@dataclass(frozen=True)
class _Row:
    number: int  # of the row, as the resamples number them
    confidence: float  # of the most probable option
    is_right: bool
    yes: float | None  # the share of yes, of yes/no questions
    is_yes: bool
    groups: Mapping[str, str]


def probability_scores(
    predictions: Iterable[Prediction],
    row_numbers: Mapping[str, int],
    resamples: Resamples,
    group_by: Sequence[str] = (),
) -> dict[str, object] | None:
    """AUROC of yes against no, accuracy of the most probable option, and calibration.

    Args:
        row_numbers: id → row, as `resamples` numbers them; other predictions are left out.

    Returns:
        For all rows, and under `groups` for each value of each group: `n`; `accuracy` and `auroc`
        (None without both truths) with intervals; `ece`, `num_bins` and the reliability `bins`.
        None if no prediction has probabilities.
    """
    rows = [
        row
        for prediction in predictions
        if prediction.id in row_numbers
        and (row := _row(prediction, row_numbers[prediction.id])) is not None
    ]
    if not rows:
        return None
    groups: dict[str, dict[str, object]] = {}
    for name in group_by:
        values = sorted({row.groups[name] for row in rows if name in row.groups})
        groups[name] = {
            value: _scores([row for row in rows if row.groups.get(name) == value], resamples)
            for value in values
        }
    return {_EVERY: _scores(rows, resamples), "groups": groups}


def _row(prediction: Prediction, number: int) -> _Row | None:
    if not prediction.probabilities:
        return None
    names = [name.strip().casefold() for name in prediction.probabilities]
    shares = list(prediction.probabilities.values())
    is_yes_no = set(names) == {"yes", "no"}
    if is_yes_no:
        truth = verdict(prediction.truth)
        right = None if truth is None else names.index(truth)
    else:
        right = option_of_truth(prediction.truth, prediction.options)
    if right is None:
        return None
    return _Row(
        number=number,
        confidence=max(shares),
        is_right=shares.index(max(shares)) == right,
        yes=shares[names.index("yes")] if is_yes_no else None,
        is_yes=names[right] == "yes",
        groups=prediction.groups,
    )


def _scores(rows: Sequence[_Row], resamples: Resamples) -> dict[str, object]:
    confidence = np.array([row.confidence for row in rows])
    is_right = np.array([row.is_right for row in rows])
    right = np.full((len(resamples.clusters), 1), np.nan)
    right[[row.number for row in rows], 0] = is_right
    [accuracy] = resamples.intervals(right)
    with_yes = [row for row in rows if row.yes is not None]
    area = auroc_interval(
        np.array([row.yes for row in with_yes], dtype=float),
        np.array([row.is_yes for row in with_yes], dtype=bool),
        resamples.clusters[[row.number for row in with_yes]],
        resamples,
    )
    fit = calibration(confidence, is_right)
    return {
        "n": len(rows),
        "accuracy": accuracy.as_dict(),
        "auroc": None if area is None else area.as_dict(),
        "ece": fit.ece,
        "num_bins": fit.num_bins,
        "bins": [asdict(one) for one in fit.bins],
    }
