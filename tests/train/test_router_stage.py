"""Stage `router` in its place between two others."""

import json

import pytest
import torch
from safetensors.torch import load_file

from moellava.train import train
from moellava.train.plan import plan
from tests.train.tiny import losses, model_weights, tiny_recipe

pytestmark = pytest.mark.usefixtures("quick_runs")


def test_med_moes_router_learns_modalities_and_stays_frozen_in_its_third_stage(
    tiny, dense, tmp_path
):
    more = {"start_from": str(dense), "moe": {"config": {"num_experts": 4}}}
    router = train(
        tiny_recipe(
            tiny, "router", tmp_path / "router", "optim.epochs=3", "optim.max_steps=null", **more
        ),
        show_progress=False,
    ).model_folder
    assert json.loads((router / "labels.json").read_text()) == ["CT", "MR", "US", "histology"]
    config = {
        "num_experts_per_tok": 1,
        "norm_topk_prob": False,
        "meta_expert": True,
        "router_bias": True,
        "router_frozen": True,
        "router_aux_loss_coef": 0.0,
        "num_experts": 4,
    }
    recipe = tiny_recipe(
        tiny,
        "experts",
        tmp_path / "experts",
        start_from=str(dense),
        trainable=["experts", "meta_expert"],
        moe={"config": config, "keep_function": False, "router": str(tmp_path / "router")},
    )
    result = train(recipe, show_progress=False)

    fitted, trained = load_file(router / "router.safetensors"), model_weights(result)
    gates = [name for name in trained if name.endswith("mlp.gate.weight")]
    assert gates
    assert all(torch.equal(trained[name], fitted["weight"]) for name in gates)
    assert losses(result)[-1] < losses(result)[0] - 0.5


def test_the_routers_plan_names_its_linear_layer(tiny, tmp_path):
    found = plan(
        tiny_recipe(tiny, "router", tmp_path / "out", "optim.max_steps=null", "optim.epochs=10")
    )
    assert found.num_trained == 4 * (32 + 1)
    assert found.num_steps == 50
    assert "router.weight (4, 32), router.bias (4,), for layers 0" in found.text
