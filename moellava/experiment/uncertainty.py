"""Uncertainty over seeds and images: intervals by scipy's bootstrap, paired t tests over seeds.

Seeds and images are crossed: every seed answers the questions about every image. Both are drawn
with replacement, independently of each other, and a mean is taken over the answers of the drawn
seeds to the questions about the drawn images (the "pigeonhole" bootstrap: Owen 2007,
doi:10.1214/07-AOAS122, which is conservative for crossed factors).

Letters: S seeds, N questions, C images, R resamples.
"""

import warnings
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy import stats

from moellava.eval.statistics import LEVEL, NUM_RESAMPLES, Floats, Interval, Ints


@dataclass(frozen=True)
class SeedTest:
    """Student's t over the seeds' own differences, images taken as given."""

    low: float
    high: float
    p_value: float


def crossed_interval(
    values: Floats, clusters: Ints, *, num_resamples: int = NUM_RESAMPLES
) -> Interval:
    """The mean of (S, N) values with its percentile interval; `nan` marks what does not count.

    Args:
        clusters: (N,) the image of each question, as `cluster_numbers` gives it.

    Returns:
        `n` is the number of questions that count for each seed.
    """
    is_known = ~np.isnan(values)
    sums = _by_image(np.where(is_known, values, 0.0), clusters)  # (S, C)
    counts = _by_image(is_known.astype(np.float64), clusters)
    value = float(sums.sum() / counts.sum())
    for axis in (0, 1):
        if sums.shape[axis] == 1:  # scipy wants two of each; two copies vary no more than one
            sums, counts = sums.repeat(2, axis), counts.repeat(2, axis)
    num_seeds, num_clusters = sums.shape

    def mean(seeds: Ints, images: Ints, axis: int = -1) -> Floats:
        of_seeds = _num_drawn(seeds, num_seeds)  # (R, S)
        of_images = _num_drawn(images, num_clusters)  # (R, C)
        total = ((of_seeds @ sums) * of_images).sum(-1)
        count = ((of_seeds @ counts) * of_images).sum(-1)
        means = np.full_like(total, np.nan)
        np.divide(total, count, out=means, where=count > 0)
        shaped: Floats = means.reshape(seeds.shape[:-1])
        return shaped

    with warnings.catch_warnings():
        # scipy warns if every resample has the same mean, whose interval is that mean.
        warnings.simplefilter("ignore", stats.DegenerateDataWarning)
        drawn = stats.bootstrap(
            (np.arange(num_seeds), np.arange(num_clusters)),
            mean,
            n_resamples=num_resamples,
            vectorized=True,
            method="percentile",
            rng=np.random.default_rng(0),
        ).bootstrap_distribution
    tail = 100 * (1 - LEVEL) / 2
    low, high = np.nanpercentile(drawn, [tail, 100 - tail])  # some may draw no question that counts
    return Interval(value, float(low), float(high), int(is_known.sum() // len(values)))


def t_test_over_seeds(differences: Floats) -> SeedTest | None:
    """Student's t test that the (S,) differences have the mean 0; None if they do not vary."""
    if len(differences) < 2 or np.ptp(differences) < 1e-12:  # rounding
        return None
    found = stats.ttest_1samp(differences, 0.0)
    interval = found.confidence_interval(LEVEL)
    return SeedTest(float(interval.low), float(interval.high), float(found.pvalue))


def _by_image(values: Floats, clusters: Ints) -> Floats:
    """(S, C) sums of (S, N) values."""
    return np.array([np.bincount(clusters, row) for row in values], dtype=np.float64)


def _num_drawn(drawn: NDArray[np.int64], num_kinds: int) -> Floats:
    """(R, kinds) how often each was drawn, of (R, n) or (n,) numbers."""
    drawn = np.atleast_2d(drawn).astype(np.int64)
    offsets = np.arange(len(drawn))[:, None] * num_kinds
    flat = np.bincount((drawn + offsets).ravel(), minlength=len(drawn) * num_kinds)
    return flat.reshape(len(drawn), num_kinds).astype(np.float64)
