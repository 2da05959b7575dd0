"""Maps of a toy that has learned something, where the place of the answer is known: a pasted disc.

The benchmark's own functions on noise instead of real pictures, so that it takes seconds;
docs/explain.md quotes the benchmark.
"""

import numpy as np
import pytest
from PIL import Image

from moellava.explain.checks import curve, order_of, randomised_layers, rank_correlation
from tests.benchmarks import explain as benchmark

SIDE, BLOCKS = 64, (4, 4)


def discs(count, seed):
    rng = np.random.default_rng(seed)
    for _ in range(count):
        noise = rng.integers(0, 120, (8, 8), dtype=np.uint8)
        yield benchmark.paste_disc(Image.fromarray(noise).resize((SIDE, SIDE)), rng)


@pytest.fixture(scope="module")
def toy(tmp_path_factory):
    folder = tmp_path_factory.mktemp("toy")
    return benchmark.train_toy(folder, list(discs(320, 0)), num_steps=100)


def explained(toy, lesion):
    return toy.explain(
        lesion.image,
        benchmark.ASKED,
        answer=lesion.pattern,
        ablation=True,
        gradient=True,
        blocks=BLOCKS,
    )


@pytest.fixture(scope="module")
def pairs(toy):
    """Held-out discs whose pattern the toy names right, with their explanations."""
    held_out = list(discs(36, 1))
    asked = [benchmark.ASKED] * len(held_out)
    answers = toy.answer([one.image for one in held_out], asked, max_new_tokens=4)
    right = [one for one, text in zip(held_out, answers, strict=True) if text == one.pattern]
    assert len(right) > 24
    return [(lesion, explained(toy, lesion)) for lesion in right]


@pytest.mark.parametrize("kind", ["attention", "ablation"])
def test_maps_point_at_the_disc(pairs, kind):
    hits = [benchmark.hit(one.map(kind), one, lesion) for lesion, one in pairs]
    chance = np.mean([lesion.mask.mean() for lesion, _ in pairs])
    assert np.mean(hits) > 1.5 * chance


def test_the_order_of_attention_beats_random_ones(toy, pairs):
    rng = np.random.default_rng(0)
    gains = {"deletion": [], "insertion": []}
    for lesion, one in pairs[:8]:
        scorer, pixels = benchmark.scorer_of(toy, lesion)
        best = order_of(one.map("attention"))
        for name, insert in (("deletion", False), ("insertion", True)):
            ours, *others = (
                np.exp(curve(scorer, pixels, order, BLOCKS, insert=insert)).mean()
                for order in (best, *(rng.permutation(len(best)) for _ in range(3)))
            )
            gains[name].append(ours - np.mean(others))
    assert np.mean(gains["deletion"]) < 0 < np.mean(gains["insertion"])


def test_maps_are_of_what_was_learned(toy, pairs):
    lesions = [lesion for lesion, _ in pairs[:6]]
    with randomised_layers(toy.model, 4):
        others = [explained(toy, lesion) for lesion in lesions]
    for kind in ("attention", "ablation", "gradient"):
        alike = [
            rank_correlation(one.map(kind), other.map(kind))
            for (_, one), other in zip(pairs, others, strict=False)
        ]
        assert np.mean(alike) < 0.6
