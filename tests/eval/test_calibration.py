"""AUROC and calibration against scikit-learn; the interval against scipy's bootstrap."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import bootstrap
from sklearn.calibration import calibration_curve
from sklearn.metrics import roc_auc_score

from moellava.eval import calibration as module
from moellava.eval.calibration import auroc, auroc_interval, calibration
from moellava.eval.statistics import Resamples


@settings(max_examples=60, deadline=None)
@given(
    st.lists(
        st.tuples(st.sampled_from([0.0, 0.1, 0.5, 0.7, 1.0]), st.booleans()),
        min_size=2,
        max_size=50,
    )
)
def test_auroc_equals_scikit_learn(rows):
    probabilities = np.array([row[0] for row in rows])
    labels = np.array([row[1] for row in rows])
    if labels.all() or not labels.any():
        assert np.isnan(auroc(probabilities, labels))
    else:
        assert auroc(probabilities, labels) == pytest.approx(roc_auc_score(labels, probabilities))


@pytest.fixture
def rows():
    """40 images with three questions each: probabilities with ties, truths, images."""
    rng = np.random.default_rng(0)
    clusters = np.repeat(np.arange(40), 3)
    labels = rng.random(120) < 0.4
    probabilities = np.round(np.clip(rng.normal(0.45 + 0.15 * labels, 0.2), 0, 1), 1)
    return probabilities, labels, clusters


def test_the_interval_of_auroc_equals_scipys_bootstrap_over_images(rows):
    probabilities, labels, clusters = rows

    def area(drawn):
        chosen = np.concatenate([np.flatnonzero(clusters == cluster) for cluster in drawn])
        return roc_auc_score(labels[chosen], probabilities[chosen])

    expected = bootstrap(
        (np.arange(40),), area, n_resamples=300, batch=300, method="percentile",
        rng=np.random.default_rng(5), vectorized=False,
    ).confidence_interval  # fmt: skip
    resamples = Resamples(clusters, num_resamples=300, seed=5)
    found = auroc_interval(*rows, resamples)
    assert (found.low, found.high) == pytest.approx((expected.low, expected.high))
    assert found.value == pytest.approx(roc_auc_score(labels, probabilities))
    assert found.n == 120


def test_weights_in_parts_change_nothing(rows, monkeypatch):
    resamples = Resamples(rows[2], num_resamples=50)
    whole = auroc_interval(*rows, resamples)
    monkeypatch.setattr(module, "_WEIGHTS_AT_ONCE", 700)
    assert auroc_interval(*rows, resamples) == whole


def test_one_truth_alone_has_no_auroc():
    resamples = Resamples(np.arange(4))
    probabilities = np.linspace(0, 1, 4)
    assert auroc_interval(probabilities, np.ones(4, bool), np.arange(4), resamples) is None
    none = np.zeros(0)
    assert auroc_interval(none, none.astype(bool), none.astype(np.int64), resamples) is None


@pytest.mark.parametrize("num_bins", [5, 10, 15])
def test_calibration_equals_scikit_learns_curve(num_bins):
    rng = np.random.default_rng(num_bins)
    confidence = rng.random(400)
    is_right = rng.random(400) < confidence**2
    accuracy, mean_confidence = calibration_curve(is_right, confidence, n_bins=num_bins)
    counts, _ = np.histogram(confidence, bins=num_bins, range=(0, 1))
    counts = counts[counts > 0]
    found = calibration(confidence, is_right, num_bins)
    assert [entry.count for entry in found.bins] == counts.tolist()
    assert [entry.accuracy for entry in found.bins] == pytest.approx(accuracy.tolist())
    assert [entry.confidence for entry in found.bins] == pytest.approx(mean_confidence.tolist())
    assert found.ece == pytest.approx((counts / 400 * abs(accuracy - mean_confidence)).sum())
