"""Statistics against scipy and statsmodels."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import binomtest, bootstrap

from moellava.eval.statistics import Resamples, cluster_numbers, mcnemar


def cluster_sums(values, clusters):
    num = clusters.max() + 1
    sums = np.array([np.nansum(values[clusters == c]) for c in range(num)])
    counts = np.array([(~np.isnan(values[clusters == c])).sum() for c in range(num)])
    return sums, counts


def scipy_interval(values, clusters, num_resamples, seed):
    """The same bootstrap by scipy, which draws the same numbers from the same generator."""
    sums, counts = cluster_sums(values, clusters)

    def mean(drawn, axis):
        return sums[drawn].sum(axis) / counts[drawn].sum(axis)

    return bootstrap(
        (np.arange(len(sums)),),
        mean,
        n_resamples=num_resamples,
        batch=num_resamples,
        method="percentile",
        rng=np.random.default_rng(seed),
        vectorized=True,
    ).confidence_interval


@pytest.mark.parametrize("seed", range(5))
def test_intervals_equal_scipys_bootstrap_over_clusters(seed):
    rng = np.random.default_rng(100 + seed)
    clusters = np.sort(rng.integers(0, 40, 200))
    clusters = np.unique(clusters, return_inverse=True)[1]
    values = rng.random(200)
    values[rng.random(200) < 0.2] = np.nan
    expected = scipy_interval(values, clusters, 500, seed)
    [found] = Resamples(clusters, num_resamples=500, seed=seed).intervals(values[:, None])
    assert (found.low, found.high) == pytest.approx((expected.low, expected.high))
    assert found.value == pytest.approx(np.nanmean(values))
    assert found.n == (~np.isnan(values)).sum()


def test_rows_of_one_image_widen_the_interval():
    """The oracle can say no: a bootstrap over rows is too sure of answers that come in sevens."""
    rng = np.random.default_rng(0)
    clusters = np.repeat(np.arange(60), 7)
    values = np.repeat(rng.random(60) < 0.5, 7).astype(float)
    [by_image] = Resamples(clusters).intervals(values[:, None])
    [by_row] = Resamples(np.arange(420)).intervals(values[:, None])
    assert by_image.high - by_image.low > 2 * (by_row.high - by_row.low)


def test_drawing_in_parts_changes_nothing(monkeypatch):
    rng = np.random.default_rng(3)
    clusters, values = np.arange(50), rng.random((50, 2))
    whole = Resamples(clusters, num_resamples=200).intervals(values)
    monkeypatch.setattr("moellava.eval.statistics._DRAWN_AT_ONCE", 130)
    assert Resamples(clusters, num_resamples=200).intervals(values) == whole


def test_draws_that_are_kept_are_those_of_the_first_call(monkeypatch):
    rng = np.random.default_rng(5)
    clusters, values = np.arange(50), rng.random((50, 2))
    kept = Resamples(clusters, num_resamples=200)
    first = kept.intervals(values)
    assert kept.intervals(values) == first
    monkeypatch.setattr("moellava.eval.statistics._KEPT_AT_MOST", 9_999)  # one less than needed
    drawn_anew = Resamples(clusters, num_resamples=200)
    assert drawn_anew.intervals(values) == drawn_anew.intervals(values) == first
    assert not drawn_anew._kept


def test_a_part_of_the_rows_is_resampled_with_all_clusters():
    rng = np.random.default_rng(4)
    clusters, values = np.repeat(np.arange(30), 3), rng.random((90, 1))
    rows = np.arange(0, 90, 2)
    masked = np.full((90, 1), np.nan)
    masked[rows] = values[rows]
    resamples = Resamples(clusters)
    assert resamples.intervals(values, rows) == resamples.intervals(masked)


def test_a_paired_difference_is_narrower_than_two_intervals():
    rng = np.random.default_rng(5)
    first = (rng.random((300, 1)) < 0.6).astype(float)
    second = first.copy()
    second[:20] = 1 - second[:20]
    resamples = Resamples(np.arange(300))
    [difference] = resamples.differences(first, second)
    [alone] = resamples.intervals(first)
    assert difference.high - difference.low < 0.6 * (alone.high - alone.low)
    assert difference.value == pytest.approx(float(first.mean() - second.mean()))


def test_a_metric_without_rows_has_no_value():
    [found] = Resamples(np.arange(5)).intervals(np.full((5, 1), np.nan))
    assert found.n == 0
    assert np.isnan([found.value, found.low, found.high]).all()


def test_rows_that_share_an_image_are_one_cluster():
    images = [["a"], ["b"], ["a", "c"], [], ["c"], [], ["d"]]
    found = cluster_numbers(images)
    assert found[0] == found[2] == found[4]
    assert len({int(number) for number in found}) == 5
    assert sorted(set(found.tolist())) == list(range(5))


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.tuples(st.booleans(), st.booleans()), min_size=1, max_size=120),
)
def test_mcnemar_equals_the_binomial_test_of_scipy(pairs):
    first, second = (np.array(column, dtype=float) for column in zip(*pairs, strict=True))
    found = mcnemar(first, second)
    total = found.only_first + found.only_second
    expected = binomtest(found.only_first, total, 0.5).pvalue if total else 1.0
    assert found.p_value == pytest.approx(expected)


def test_mcnemar_equals_statsmodels():
    contingency = pytest.importorskip("statsmodels.stats.contingency_tables")
    rng = np.random.default_rng(0)
    first, second = (rng.random(500) < 0.7).astype(float), (rng.random(500) < 0.6).astype(float)
    table = [
        [((first == a) & (second == b)).sum() for b in (1, 0)] for a in (1, 0)
    ]  # rows: first right, wrong
    expected = contingency.mcnemar(table, exact=True)
    found = mcnemar(first, second)
    assert (found.only_first, found.only_second) == (table[0][1], table[1][0])
    assert found.p_value == pytest.approx(expected.pvalue)


def test_mcnemar_of_many_rows_neither_overflows_nor_vanishes():
    first = np.zeros(20_000)
    first[:10_300] = 1
    found = mcnemar(first, 1 - first)
    assert found.p_value == pytest.approx(binomtest(10_300, 20_000).pvalue, rel=1e-6)


def test_mcnemar_is_only_for_right_and_wrong():
    assert mcnemar(np.array([0.5, 1.0]), np.array([0.0, 1.0])) is None
