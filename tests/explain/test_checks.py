"""Checks of maps: curves by hand, randomised weights change every map."""

import numpy as np
import pytest
import torch

from moellava.explain import explain
from moellava.explain.checks import curve, order_of, randomised_layers, rank_correlation


class CountsBright:
    """A scorer whose answer is the more probable, the more bright pixels there are."""

    def __call__(self, pixel_values):
        return (pixel_values[:, :, 0] > 0.5).flatten(1).float().sum(1, keepdim=True)


def test_curves_by_hand():
    pixels = torch.zeros(1, 3, 4, 4)
    pixels[:, :, :2, :2] = 1  # one bright block of four; the mean colour is 1/4
    order = order_of(np.array([[[1, 0], [0, 0]]], dtype=np.float32))
    np.testing.assert_array_equal(order, [0, 1, 2, 3])
    deleted = curve(CountsBright(), pixels, order, (2, 2))
    np.testing.assert_array_equal(deleted, [4, 0, 0, 0, 0])
    inserted = curve(CountsBright(), pixels, order, (2, 2), insert=True)
    np.testing.assert_array_equal(inserted, [0, 4, 4, 4, 4])
    worst = curve(CountsBright(), pixels, order[::-1].copy(), (2, 2))
    np.testing.assert_array_equal(worst, [4, 4, 4, 4, 0])


def test_a_whole_deletion_ends_at_the_blank_image(loaded, picture):
    from moellava.explain.effects import AnswerScorer, mean_colour

    prompt = loaded.processor(
        text=["<image>\nIs it a lung?"], images=[picture], return_tensors="pt"
    )
    ids = torch.cat([prompt["input_ids"], torch.tensor([[301, 302]])], dim=1)
    scorer = AnswerScorer(loaded.model, ids, ids.shape[1] - 2)
    found = curve(scorer, prompt["pixel_values"], [3, 1, 0, 2], (2, 2), batch_size=3)
    with torch.no_grad():
        blank = scorer(mean_colour(prompt["pixel_values"])[None]).sum()
        whole = scorer(prompt["pixel_values"][None]).sum()
    assert found[0] == pytest.approx(float(whole), rel=1e-4)
    assert found[-1] == pytest.approx(float(blank), rel=1e-4)


def test_rank_correlation_equals_scipys():
    from scipy.stats import spearmanr

    rng = np.random.default_rng(0)
    first, second = rng.integers(0, 9, (2, 5, 6)).astype(np.float32)
    expected = spearmanr(first.ravel(), second.ravel()).statistic
    assert rank_correlation(first, second) == pytest.approx(expected)
    assert rank_correlation(first, 3 * first) == pytest.approx(1)
    assert rank_correlation(first, np.zeros_like(first)) == 0


@pytest.mark.parametrize("num_layers", [1, 4])
def test_randomised_weights_change_every_map(loaded, picture, explanation, num_layers):
    with randomised_layers(loaded.model, num_layers):
        other = explain(
            loaded,
            picture,
            "What organ is shown?",
            answer="the left lung",
            gradient=True,
            ablation=True,
            blocks=(2, 3),
        )
    for kind in ("attention", "rollout", "ablation", "gradient"):
        assert not np.allclose(other.map(kind), explanation.map(kind), rtol=1e-3)
    first, last = loaded.model.config.text_config.num_hidden_layers - num_layers, -1
    if first:  # layers before the randomised ones saw nothing of it
        np.testing.assert_allclose(
            other.attention[:first], explanation.attention[:first], rtol=1e-4
        )
    assert rank_correlation(other.map(layer=last), explanation.map(layer=last)) < 0.9


def test_the_weights_come_back(loaded, picture, explanation):
    with pytest.raises(RuntimeError, match="stop"), randomised_layers(loaded.model, 2):
        raise RuntimeError("stop")
    again = explain(loaded, picture, "What organ is shown?", answer="the left lung")
    np.testing.assert_array_equal(again.attention, explanation.attention)
