"""The model that a stage trains, built of what it starts from."""

import pytest

from moellava.train.prepare import prepare_model
from tests.train.tiny import tiny_recipe

pytestmark = pytest.mark.usefixtures("quick_runs")


def test_experts_can_start_from_the_published_parts(tiny):
    recipe = tiny_recipe(tiny, "experts", tiny / "never", moe={"config": {"num_experts": 3}})
    model, _ = prepare_model(recipe)
    assert model.config.text_config.num_experts == 3


def test_a_mixture_cannot_be_upcycled_again(chain, tiny):
    more = {"start_from": str(chain / "experts"), "after": "experts"}
    recipe = tiny_recipe(
        tiny, "experts", chain / "wrong", moe={"config": {"num_experts": 2}}, **more
    )
    with pytest.raises(ValueError, match=r"is a mixture of experts already.*set moe.config=\{\}"):
        prepare_model(recipe)
    model, _ = prepare_model(tiny_recipe(tiny, "experts", chain / "x", **more))
    assert model.model.language_model.layers[1].mlp.experts.gate_up_proj.requires_grad
