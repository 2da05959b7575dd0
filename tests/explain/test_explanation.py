"""Maps of an explanation, and its pictures."""

import numpy as np
import pytest

from moellava.explain import KINDS


@pytest.mark.parametrize("kind", KINDS)
def test_every_map_has_a_place_on_the_picture(explanation, kind):
    values = explanation.map(kind)
    assert values.shape == ((10, 10) if kind in ("attention", "rollout") else (2, 3))
    placed = explanation.on_picture(values)
    assert placed.shape == (180, 300)
    assert np.isnan(placed[:, :58]).all()  # 60 pixels on either side are cropped away
    assert np.isfinite(placed[:, 62:238]).all()


def test_a_map_is_the_mean_over_layers_heads_and_tokens(explanation):
    whole = explanation.attention.mean((0, 1, 2)).reshape(10, 10)
    np.testing.assert_allclose(explanation.map(), whole, rtol=1e-5)
    one = explanation.attention[2, 3, 1].reshape(10, 10)
    np.testing.assert_allclose(explanation.map(layer=2, head=3, token=1), one)


def test_the_ablation_of_all_tokens_is_the_sum(explanation):
    parts = [explanation.map("ablation", token=token) for token in range(len(explanation.tokens))]
    np.testing.assert_allclose(explanation.map("ablation"), np.sum(parts, axis=0), atol=1e-6)


def test_the_blank_image_has_maps_of_its_own(explanation):
    blank = explanation.map(blank=True)
    assert blank.shape == (10, 10)
    assert not np.allclose(blank, explanation.map())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"kind": "attenton"}, "Unknown map 'attenton'. Did you mean 'attention'"),
        ({"kind": "rollout", "layer": 1}, "layer and head are of 'attention'"),
        ({"kind": "gradient", "token": 0}, "leave token out"),
        ({"kind": "ablation", "blank": True}, "compares with the blank image"),
    ],
)
def test_a_map_that_cannot_be(explanation, options, message):
    with pytest.raises(ValueError, match=message):
        explanation.map(**options)


def test_image_share_is_part_of_a_whole(explanation):
    share = explanation.image_share()
    assert share.shape == (4, 4)
    assert (share > 0).all()
    assert (share < 1).all()


def test_numbers_survive_a_file(explanation, tmp_path):
    numbers = explanation.to_dict()
    assert numbers["answer"] == explanation.answer
    arrays = {name: value for name, value in numbers.items() if isinstance(value, np.ndarray)}
    np.savez(tmp_path / "numbers.npz", **arrays)
    with np.load(tmp_path / "numbers.npz") as read:
        np.testing.assert_array_equal(read["attention"], explanation.attention)
    assert numbers["routing"]["experts"].shape == explanation.routing.experts.shape
