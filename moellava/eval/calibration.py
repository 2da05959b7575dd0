"""How good probabilities are: `auroc` and `auroc_interval`, `calibration`.

Letters: R resamples, C clusters (images), N rows, K distinct probabilities.
"""

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from moellava.eval.statistics import Floats, Interval, Ints, Resamples, percentile_bounds

_WEIGHTS_AT_ONCE = 1 << 20  # of rows, 8 MiB


def auroc(probabilities: Floats, is_positive: NDArray[np.bool_]) -> float:
    """The chance that a positive row has a higher probability than a negative one; ties count half.

    `nan` if there are no positive or no negative rows.
    """
    return float(_areas(probabilities, is_positive, np.ones((1, len(probabilities))))[0])


def auroc_interval(
    probabilities: Floats, is_positive: NDArray[np.bool_], clusters: Ints, resamples: Resamples
) -> Interval | None:
    """`auroc` with its percentile interval; resamples with one truth only are left out.

    Args:
        clusters: (N,) the image of each row, as `resamples` numbers them.

    Returns:
        None if the rows have one truth only.
    """
    value = auroc(probabilities, is_positive)
    if math.isnan(value):
        return None
    step = max(1, _WEIGHTS_AT_ONCE // len(probabilities))
    drawn = [
        _areas(probabilities, is_positive, weights[start : start + step][:, clusters])
        for weights in resamples.weights()
        for start in range(0, len(weights), step)
    ]
    low, high = percentile_bounds(np.concatenate(drawn)[:, None])
    return Interval(value, float(low[0]), float(high[0]), len(probabilities))


def _areas(probabilities: Floats, is_positive: NDArray[np.bool_], weights: Floats) -> Floats:
    """(R,) the area for each row of weights (R, N), which say how often a row counts."""
    if not len(probabilities):
        return np.full(len(weights), np.nan)
    order = np.argsort(probabilities, kind="stable")
    is_new = np.diff(probabilities[order], prepend=-np.inf) > 0
    starts = np.flatnonzero(is_new)
    positive = np.add.reduceat((weights * is_positive)[:, order], starts, axis=1)  # (R, K)
    negative = np.add.reduceat((weights * ~is_positive)[:, order], starts, axis=1)
    below = np.cumsum(negative, axis=1) - negative / 2
    pairs = positive.sum(axis=1) * negative.sum(axis=1)
    found: Floats = np.full(len(weights), np.nan)
    np.divide((positive * below).sum(axis=1), pairs, out=found, where=pairs > 0)
    return found


@dataclass(frozen=True)
class Bin:
    """Rows of similar confidence: their number, mean confidence and share that is right."""

    count: int
    confidence: float
    accuracy: float


@dataclass(frozen=True)
class Calibration:
    """The expected calibration error over bins of equal width; empty bins are left out."""

    ece: float
    num_bins: int
    bins: list[Bin]


def calibration(confidence: Floats, is_right: NDArray[np.bool_], num_bins: int = 15) -> Calibration:
    """How far confidence is from accuracy: the mean over rows of each bin's difference.

    Bin k holds the confidences in (k/num_bins, (k+1)/num_bins]; the first also holds 0.
    """
    edges = np.linspace(0.0, 1.0, num_bins + 1)
    numbers = np.searchsorted(edges[1:-1], confidence, side="left")
    bins, error = [], 0.0
    for number in range(num_bins):
        is_here = numbers == number
        count = int(is_here.sum())
        if count:
            found = Bin(count, float(confidence[is_here].mean()), float(is_right[is_here].mean()))
            bins.append(found)
            error += count / len(confidence) * abs(found.confidence - found.accuracy)
    return Calibration(error if bins else math.nan, num_bins, bins)
