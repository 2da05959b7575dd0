"""Counts, loads and flows of routes, by hand."""

import numpy as np
import pytest

from moellava.explain.routing import Routing, phases_of, shares


@pytest.fixture
def routing():
    """Two sparse layers, three experts, two per token; two image tokens, a question, an answer."""
    experts = np.array(
        [
            [[0, 1], [0, 2], [1, 2], [2, 0]],
            [[1, 0], [1, 0], [2, 1], [0, 1]],
        ]
    )
    weights = np.array(
        [
            [[0.75, 0.25], [0.5, 0.5], [0.6, 0.4], [0.9, 0.1]],
            [[1.0, 0.0], [0.5, 0.5], [0.7, 0.3], [0.8, 0.2]],
        ],
        dtype=np.float32,
    )
    return Routing(
        layers=(0, 2),
        num_experts=3,
        experts=experts,
        weights=weights,
        tokens=("<image>", "<image>", "What", "lung"),
        phases=("image", "image", "question", "answer"),
    )


def test_counts_are_of_all_k_experts(routing):
    np.testing.assert_array_equal(routing.counts("image"), [[2, 1, 1], [2, 2, 0]])
    np.testing.assert_array_equal(routing.counts("answer"), [[1, 0, 1], [1, 1, 0]])
    assert sum(routing.counts(phase).sum() for phase in ("image", "question", "answer")) == 16


def test_load_is_the_share_of_the_assignments(routing):
    np.testing.assert_allclose(routing.load("image"), [[0.5, 0.25, 0.25], [0.5, 0.5, 0]])


def test_flows_keep_the_weight_of_every_token(routing):
    flows = routing.flows("image")
    assert flows.shape == (1, 3, 3)
    # token 1: (3/4, 1/4, 0) to (0, 1, 0); token 2: (1/2, 0, 1/2) to (1/2, 1/2, 0)
    expected = np.array([[0.25, 1.0, 0], [0, 0.25, 0], [0.25, 0.25, 0]]) / 2
    np.testing.assert_allclose(flows[0], expected, atol=1e-6)
    np.testing.assert_allclose(flows[0].sum(1), routing.spread()[0, :2].mean(0), atol=1e-6)


def test_weights_that_do_not_sum_to_one_are_shares_all_the_same(routing):
    halved = Routing(**{**vars(routing), "weights": routing.weights / 2})
    np.testing.assert_allclose(halved.flows("question"), routing.flows("question"), atol=1e-6)


def test_phases():
    assert phases_of([False, True, True, False, False], 4) == (
        "question",
        "image",
        "image",
        "question",
        "answer",
    )


def test_nothing_to_share_is_zero():
    np.testing.assert_array_equal(shares(np.zeros((1, 3))), [[0, 0, 0]])
