"""Uncertainty of scores, in numpy: intervals by bootstrap over images, and paired tests.

| name | gives |
|---|---|
| `Resamples` | means and differences of means with 95 % intervals |
| `mcnemar` | the p value of answers that changed between right and wrong |
| `percentile_bounds` | the interval that resampled values span |

Letters: R resamples, C clusters (images), N rows, M metrics.
"""

import math
from collections.abc import Hashable, Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]

NUM_RESAMPLES = 1000
LEVEL = 0.95
_DRAWN_AT_ONCE = 1 << 22  # indices, 32 MiB
_KEPT_AT_MOST = 1 << 24  # counts of drawn clusters, 32 MiB


@dataclass(frozen=True)
class Interval:
    """A value and the percentile interval of its bootstrap; `n` rows were averaged."""

    value: float
    low: float
    high: float
    n: int

    def as_dict(self) -> dict[str, float]:
        return {"value": self.value, "low": self.low, "high": self.high, "n": self.n}


def cluster_numbers(images: Iterable[Sequence[Hashable]]) -> Ints:
    """(N,) a number for each row; rows that share an image, directly or through others, share it.

    A row without images is a cluster of its own.
    """
    parents: list[int] = []
    first_row: dict[Hashable, int] = {}

    def root(row: int) -> int:
        while parents[row] != row:
            parents[row] = parents[parents[row]]
            row = parents[row]
        return row

    for row, names in enumerate(images):
        parents.append(row)
        for name in names:
            parents[root(row)] = root(first_row.setdefault(name, row))
    roots = np.array([root(row) for row in range(len(parents))], dtype=np.int64)
    return np.unique(roots, return_inverse=True)[1].astype(np.int64).reshape(-1)


class Resamples:
    """Bootstrap of clusters of rows, the same resamples for everything that is asked of it.

    Clusters are drawn with replacement, as many as there are, and each brings all of its rows; a
    mean is the sum over the rows drawn by their number. Intervals are percentiles. `nan` marks a
    row that a metric does not apply to.

    Args:
        clusters: (N,) the cluster of each row, see `cluster_numbers`.
        seed: the resamples are the same for the same seed and number of clusters.
    """

    def __init__(self, clusters: Ints, *, num_resamples: int = NUM_RESAMPLES, seed: int = 0):
        self.clusters, self.num_resamples, self.seed = clusters, num_resamples, seed
        self.num_clusters = int(clusters.max()) + 1 if len(clusters) else 0
        self._kept: list[NDArray[np.uint16]] = []

    def intervals(self, values: Floats, rows: Ints | None = None) -> list[Interval]:
        """The mean of each metric over the rows, or over some of them, with its interval.

        Args:
            values: (N, M).
            rows: numbers of the rows that count; all if left out.
        """
        sums, counts = self._totals(values, rows)
        means, drawn = _ratio(sums.sum(0), counts.sum(0)), self._drawn_means(sums, counts)
        low, high = percentile_bounds(drawn)
        return [
            Interval(float(means[m]), float(low[m]), float(high[m]), int(counts[:, m].sum()))
            for m in range(values.shape[1])
        ]

    def differences(
        self, first: Floats, second: Floats, rows: Ints | None = None
    ) -> list[Interval]:
        """The mean of `first - second`, (N, M) each, over the rows where both are known."""
        return self.intervals(first - second, rows)

    def _totals(self, values: Floats, rows: Ints | None) -> tuple[Floats, Floats]:
        """(C, M) sums and counts of each cluster."""
        clusters = self.clusters if rows is None else self.clusters[rows]
        values = values if rows is None else values[rows]
        is_known = ~np.isnan(values)
        sums = np.zeros((self.num_clusters, values.shape[1]))
        counts = np.zeros_like(sums)
        for m in range(values.shape[1]):
            known = is_known[:, m]
            at = clusters[known]
            sums[:, m] = np.bincount(at, values[known, m], minlength=self.num_clusters)
            counts[:, m] = np.bincount(at, minlength=self.num_clusters)
        return sums, counts

    def _drawn_means(self, sums: Floats, counts: Floats) -> Floats:
        """(R, M); clusters without a row that counts are drawn, too, and add nothing."""
        used = np.flatnonzero(counts.any(axis=1))
        # One product gives sums and counts, and only over the clusters that have any.
        totals = np.concatenate([sums[used], counts[used]], axis=1)  # (C_used, 2M)
        is_all = len(used) == self.num_clusters
        parts = [(w if is_all else w[:, used]) @ totals for w in self.weights()]
        drawn = np.concatenate(parts) if parts else np.zeros((0, totals.shape[1]))
        num_metrics = sums.shape[1]
        return _ratio(drawn[:, :num_metrics], drawn[:, num_metrics:])

    def weights(self) -> Iterator[Floats]:
        """How often each cluster is drawn, (r, C) for a few resamples at a time.

        They are kept, two bytes each, if that takes little: groups ask for them again and again.
        """
        if not self.num_clusters:
            return
        if self._kept:
            yield from (part.astype(np.float64) for part in self._kept)
            return
        num_counts = self.num_resamples * self.num_clusters
        is_kept = num_counts <= _KEPT_AT_MOST and self.num_clusters <= np.iinfo(np.uint16).max
        kept = []
        rng = np.random.default_rng(self.seed)
        step = max(1, _DRAWN_AT_ONCE // self.num_clusters)
        for start in range(0, self.num_resamples, step):
            size = min(step, self.num_resamples - start)
            drawn = rng.integers(0, self.num_clusters, (size, self.num_clusters))
            offsets = np.arange(size)[:, None] * self.num_clusters
            flat = np.bincount((drawn + offsets).ravel(), minlength=size * self.num_clusters)
            counts = flat.reshape(size, self.num_clusters)
            if is_kept:
                kept.append(counts.astype(np.uint16))
            yield counts.astype(np.float64)
        self._kept = kept


def _ratio(sums: Floats, counts: Floats) -> Floats:
    """`nan` if nothing was counted."""
    return np.divide(sums, counts, out=np.full_like(sums, np.nan), where=counts > 0)


def percentile_bounds(drawn: Floats) -> tuple[Floats, Floats]:
    """The bounds of the interval of each column of (R, M); a `nan` is no resample of its column."""
    tail = 100 * (1 - LEVEL) / 2
    bounds = np.full((2, drawn.shape[1]), np.nan)
    for m in range(drawn.shape[1]):
        column = drawn[:, m]
        column = column[~np.isnan(column)]
        if len(column):
            bounds[:, m] = np.percentile(column, [tail, 100 - tail])
    return bounds[0], bounds[1]


@dataclass(frozen=True)
class McNemar:
    """Rows that only one side has right, and the two-sided exact p value that both are as good."""

    only_first: int
    only_second: int
    p_value: float


def mcnemar(first: Floats, second: Floats) -> McNemar | None:
    """McNemar's exact (binomial) test of two (N,) columns of rights and wrongs.

    Returns:
        None if a value is neither 0 nor 1: the test is about right and wrong only.
    """
    is_known = ~(np.isnan(first) | np.isnan(second))
    one, other = first[is_known], second[is_known]
    if not (np.isin(one, (0, 1)).all() and np.isin(other, (0, 1)).all()):
        return None
    only_first, only_second = int((one > other).sum()), int((one < other).sum())
    return McNemar(
        only_first, only_second, _binomial_p(min(only_first, only_second), only_first + only_second)
    )


def _binomial_p(fewer: int, total: int) -> float:
    """Twice the chance of at most so many heads in `total` throws of a fair coin."""
    if not total:
        return 1.0
    log_chances = [
        math.lgamma(total + 1) - math.lgamma(k + 1) - math.lgamma(total - k + 1)
        for k in range(fewer + 1)
    ]
    return min(1.0, 2 * math.fsum(math.exp(chance - total * math.log(2)) for chance in log_chances))
