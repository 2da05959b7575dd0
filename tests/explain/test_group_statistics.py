"""Intervals and mutual information, by hand and against other people's code."""

import numpy as np
import pytest

from moellava.explain.group_statistics import bootstrap_loads, information, mean_shares

RNG = np.random.default_rng


def one_hot(experts, num_experts=2):
    return np.eye(num_experts)[np.asarray(experts)]


def test_shares_of_nothing_are_nan():
    shares = mean_shares(np.array([[3, 1], [0, 0]]))
    np.testing.assert_array_equal(shares[0], [0.75, 0.25])
    assert np.isnan(shares[1]).all()


def test_information_is_one_bit_if_group_and_expert_are_the_same():
    groups = np.array(["CT", "MR"] * 20)
    images = np.array([str(number) for number in range(40)])
    found = information(one_hot([0, 1] * 20), groups, images, 200, RNG(0))
    assert found.bits == pytest.approx(1)
    assert found.p_value == pytest.approx(1 / 201, abs=1e-4)
    assert found.shuffled_95 < 0.2


def test_information_equals_scikit_learns():
    metrics = pytest.importorskip("sklearn.metrics")
    rng = RNG(1)
    experts, labels = rng.integers(0, 4, 300), rng.integers(0, 3, 300)
    images = np.array([str(number) for number in range(300)])
    found = information(one_hot(experts, 4), labels.astype(str), images, 10, RNG(0))
    expected = metrics.mutual_info_score(labels, experts) / np.log(2)
    assert found.bits == pytest.approx(expected, abs=1e-5)


def test_labels_that_mean_nothing_are_not_significant():
    """Many rows of few images: shuffled by rows, chance would look like knowledge."""
    rng = RNG(3)
    p_values = []
    for _ in range(30):
        experts = np.repeat(rng.integers(0, 2, 8), 25)  # every row of an image goes its image's way
        groups = np.repeat(rng.permutation(["CT"] * 4 + ["MR"] * 4), 25)
        images = np.repeat([str(number) for number in range(8)], 25)
        p_values.append(information(one_hot(experts), groups, images, 50, rng).p_value)
    assert np.mean(np.array(p_values) < 0.05) < 0.2
    assert np.mean(p_values) > 0.3


def test_images_with_rows_of_two_groups_are_shuffled_by_rows():
    groups = np.array(["yes", "no"] * 20)
    images = np.repeat([str(number) for number in range(20)], 2)
    found = information(one_hot([0, 1] * 20), groups, images, 100, RNG(0))
    assert found.bits == pytest.approx(1)
    assert found.shuffled_mean < 0.1


def test_a_phase_without_tokens_tells_nothing():
    shares = np.full((4, 2), np.nan)
    found = information(shares, np.array(list("abab")), np.array(list("1234")), 5, RNG(0))
    assert (found.bits, found.p_value) == (0, 1)
    load, _, _ = bootstrap_loads(shares[:, None], np.array(list("1234")), 5, RNG(0))
    assert np.isnan(load).all()


def test_the_interval_is_that_of_images():
    """Rows that repeat an image say nothing new, so the interval does not narrow."""
    rng = RNG(0)
    shares = one_hot(rng.integers(0, 2, 40))[:, None]  # (R, 1 layer, 2 experts)
    images = np.array([str(number) for number in range(40)])
    load, low, high = bootstrap_loads(shares, images, 2000, RNG(1))
    np.testing.assert_allclose(load, shares.mean(0), rtol=1e-6)
    share = float(load[0, 0])
    standard_error = np.sqrt(share * (1 - share) / 40)
    assert high[0, 0] - low[0, 0] == pytest.approx(2 * 1.96 * standard_error, rel=0.15)
    repeated = bootstrap_loads(shares.repeat(10, 0), images.repeat(10), 2000, RNG(1))
    np.testing.assert_allclose(np.stack(repeated), np.stack([load, low, high]), rtol=1e-6)


def test_one_image_has_an_interval_of_no_width():
    shares = one_hot([0, 1, 1])[:, None]
    load, low, high = bootstrap_loads(shares, np.array(["a", "a", "a"]), 10, RNG(0))
    np.testing.assert_allclose(low, load, rtol=1e-6)
    np.testing.assert_allclose(high, load, rtol=1e-6)
