"""A frozen router has to be a fitted one, of the same layers; its labels stay with the model."""

import json

import pytest

from moellava.model.builder_enhanced import load_pretrained_model
from moellava.train import train
from moellava.train.plan import plan
from tests.train.tiny import tiny_recipe

pytestmark = pytest.mark.usefixtures("quick_runs")
FROZEN = {
    "num_experts": 4,
    "num_experts_per_tok": 1,
    "norm_topk_prob": False,
    "meta_expert": True,
    "router_bias": True,
    "router_frozen": True,
    "router_aux_loss_coef": 0.0,
}


@pytest.fixture(scope="module")
def router(tiny, dense, tmp_path_factory, quick_runs):
    """A fitted router's run; some rows have no image and no modality."""
    folder = tmp_path_factory.mktemp("router")
    rows = json.loads((tiny / "rows.json").read_text())
    del rows[0]["modality"]
    (folder / "rows.json").write_text(json.dumps(rows))
    recipe = tiny_recipe(
        tiny,
        "router",
        folder / "run",
        "optim.epochs=3",
        "optim.max_steps=null",
        f"data.train={folder / 'rows.json'}",
        start_from=str(dense),
        moe={"config": {"num_experts": 4}},
    )
    train(recipe, show_progress=False)
    return folder / "run"


def experts(tiny, dense, out, *overrides, **moe):
    moe = {"config": FROZEN, "keep_function": False, **moe}
    more = {"start_from": str(dense), "trainable": ["experts", "meta_expert"], "moe": moe}
    return tiny_recipe(tiny, "experts", out, "optim.max_steps=1", *overrides, **more)


def test_frozen_routers_without_a_fitted_one_are_refused(tiny, dense, tmp_path):
    recipe = experts(tiny, dense, tmp_path / "out")
    for run in (plan, train):
        with pytest.raises(ValueError, match=r"router_frozen is true, but moe.router is not set"):
            run(recipe)


def test_a_router_of_other_layers_is_refused(tiny, dense, router, tmp_path):
    config = {**FROZEN, "moe_layers": [1]}
    recipe = experts(tiny, dense, tmp_path / "out", router=str(router), config=config)
    with pytest.raises(ValueError, match=r"was fitted to the layers \[0\], but .* layers \[1\]"):
        train(recipe, show_progress=False)


def test_the_labels_of_the_experts_stay_with_the_model(tiny, dense, router, tmp_path):
    recipe = experts(tiny, dense, tmp_path / "out", router=str(router))
    loaded = load_pretrained_model(train(recipe, show_progress=False).model_folder)
    assert loaded.model.config.expert_labels == ["CT", "MR", "US", "histology"]
    loaded.model.save_pretrained(tmp_path / "again")
    config = json.loads((tmp_path / "again" / "config.json").read_text())
    assert config["expert_labels"] == ["CT", "MR", "US", "histology"]


def test_the_fit_is_logged(router):
    log = json.loads((router / "log.json").read_text())
    assert [entry["epoch"] for entry in log] == [1, 2, 3]
    assert log[2]["loss"] < log[0]["loss"]


def test_a_row_with_an_image_needs_a_modality(tiny, dense, tmp_path):
    rows = json.loads((tiny / "rows.json").read_text())
    del rows[1]["modality"]
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    recipe = tiny_recipe(
        tiny,
        "router",
        tmp_path / "out",
        "optim.max_steps=null",
        f"data.train={tmp_path / 'rows.json'}",
        start_from=str(dense),
    )
    with pytest.raises(ValueError, match=r"Row 'row1' has no 'modality'"):
        train(recipe, show_progress=False)
