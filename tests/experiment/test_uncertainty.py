"""Intervals over seeds and images against scipy, statsmodels and the formula of the variance."""

import numpy as np
import pytest
from scipy import stats
from statsmodels.stats.weightstats import DescrStatsW

from moellava.experiment.uncertainty import crossed_interval, t_test_over_seeds

Z = stats.norm.ppf(0.975)


def half_width(interval):
    return (interval.high - interval.low) / 2


def test_one_seed_is_scipys_bootstrap_over_images():
    rng = np.random.default_rng(1)
    values = rng.integers(0, 2, (1, 60)).astype(float)
    found = crossed_interval(values, np.arange(60), num_resamples=20_000)
    theirs = stats.bootstrap(
        (values[0],), np.mean, n_resamples=20_000, method="percentile", rng=rng
    ).confidence_interval
    assert (found.low, found.high) == pytest.approx((theirs.low, theirs.high), abs=0.02)
    assert found.value == values.mean()
    assert found.n == 60


def test_one_image_is_scipys_bootstrap_over_seeds():
    rng = np.random.default_rng(2)
    values = rng.normal(size=(8, 1))
    found = crossed_interval(values, np.zeros(1, dtype=int), num_resamples=20_000)
    theirs = stats.bootstrap(
        (values[:, 0],), np.mean, n_resamples=20_000, method="percentile", rng=rng
    ).confidence_interval
    assert (found.low, found.high) == pytest.approx((theirs.low, theirs.high), abs=0.03)


def test_the_variances_of_seeds_and_images_add_up():
    """Of an additive table: Var = var(seeds) / S + var(images) / C, with plug-in variances."""
    rng = np.random.default_rng(3)
    seeds, images = rng.normal(size=40), rng.normal(size=50)
    values = seeds[:, None] + images[None, :]
    found = crossed_interval(values, np.arange(50), num_resamples=20_000)
    expected = Z * np.sqrt(seeds.var() / 40 + images.var() / 50)
    assert half_width(found) == pytest.approx(expected, rel=0.05)


def test_questions_about_one_image_stand_or_fall_together():
    rng = np.random.default_rng(4)
    images = rng.integers(0, 2, 30).astype(float)
    values = np.repeat(images, 4)[None, :]
    clusters = np.repeat(np.arange(30), 4)
    together = crossed_interval(values, clusters, num_resamples=5000)
    apart = crossed_interval(values, np.arange(120), num_resamples=5000)
    assert half_width(together) == pytest.approx(2 * half_width(apart), rel=0.1)


def test_values_that_do_not_count_are_left_out():
    values = np.array([[1.0, np.nan, 0.0, 1.0], [1.0, np.nan, 1.0, 1.0]])
    found = crossed_interval(values, np.arange(4), num_resamples=200)
    assert found.value == pytest.approx(5 / 6)
    assert found.n == 3


def test_equal_values_have_an_interval_without_width():
    found = crossed_interval(np.ones((3, 4)), np.arange(4), num_resamples=50)
    assert (found.value, found.low, found.high) == (1, 1, 1)


def test_the_t_test_over_seeds_is_statsmodels_own():
    differences = np.array([0.03, -0.01, 0.05, 0.02, 0.04])
    found = t_test_over_seeds(differences)
    theirs = DescrStatsW(differences)
    assert (found.low, found.high) == pytest.approx(theirs.tconfint_mean())
    assert found.p_value == pytest.approx(theirs.ttest_mean(0)[1])


@pytest.mark.parametrize("differences", [[0.1], [0.1, 0.1, 0.1]])
def test_without_variation_there_is_no_t_test(differences):
    assert t_test_over_seeds(np.array(differences)) is None
