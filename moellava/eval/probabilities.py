"""Probabilities of closed answers → AUROC and calibration: `probability_scores`."""

from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass

import numpy as np

from moellava.eval.predictions import Prediction
from moellava.eval.scorers.choices import option_of_truth
from moellava.eval.scorers.strict import verdict
from moellava.eval.statistics import auroc, calibration

_EVERY = "all"


@dataclass(frozen=True)
class _Row:
    confidence: float  # of the most probable option
    is_right: bool
    yes: float | None  # the share of yes, of yes/no questions
    is_yes: bool
    groups: dict[str, str]


def probability_scores(
    predictions: Iterable[Prediction], group_by: Sequence[str] = ()
) -> dict[str, object] | None:
    """AUROC of yes against no, accuracy of the most probable option, and calibration.

    Returns:
        For all rows, and under `groups` for each value of each group: `n`, `accuracy`, `auroc`
        (None without both truths), `ece`, `num_bins` and the reliability `bins`. None if no
        prediction has probabilities.
    """
    rows = [row for prediction in predictions if (row := _row(prediction)) is not None]
    if not rows:
        return None
    groups: dict[str, dict[str, object]] = {}
    for name in group_by:
        values = sorted({row.groups[name] for row in rows if name in row.groups})
        groups[name] = {
            value: _scores([row for row in rows if row.groups.get(name) == value])
            for value in values
        }
    return {_EVERY: _scores(rows), "groups": groups}


def _row(prediction: Prediction) -> _Row | None:
    shares = prediction.probabilities
    if not shares:
        return None
    names = list(shares)
    if set(names) == {"yes", "no"}:
        truth = verdict(prediction.truth)
        right = None if truth is None else names.index(truth)
    else:
        right = option_of_truth(prediction.truth, prediction.options)
    if right is None:
        return None
    best = max(range(len(names)), key=lambda number: shares[names[number]])
    return _Row(
        confidence=shares[names[best]],
        is_right=best == right,
        yes=shares.get("yes"),
        is_yes=names[right] == "yes",
        groups=dict(prediction.groups),
    )


def _scores(rows: Sequence[_Row]) -> dict[str, object]:
    confidence = np.array([row.confidence for row in rows])
    is_right = np.array([row.is_right for row in rows])
    with_yes = [row for row in rows if row.yes is not None]
    area = auroc(
        np.array([row.yes for row in with_yes], dtype=float),
        np.array([row.is_yes for row in with_yes], dtype=bool),
    )
    fit = calibration(confidence, is_right)
    return {
        "n": len(rows),
        "accuracy": float(is_right.mean()),
        "auroc": None if np.isnan(area) else area,
        "ece": fit.ece,
        "num_bins": fit.num_bins,
        "bins": [asdict(one) for one in fit.bins],
    }
