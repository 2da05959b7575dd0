"""Med-MoE's router: what it is fitted to."""

import pytest
import torch

from moellava.data import read_rows
from moellava.data.collate import ChatCollator
from moellava.model.builder_enhanced import load_pretrained_model
from moellava.train import train
from moellava.train.router_fit import mean_hidden_states
from tests.train.tiny import tiny_recipe

pytestmark = pytest.mark.usefixtures("quick_runs")


def test_the_fitted_router_equals_routing_by_averaged_logits(tiny, dense):
    """The mean of the logits, computed token by token, is the linear layer of the mean."""

    loaded = load_pretrained_model(dense / "model", dtype="float32")
    rows = read_rows(str(tiny / "rows.json"), images=tiny / "images")
    chosen = [rows[0], rows[1], rows[2]]
    collator = ChatCollator(loaded.processor)
    means = mean_hidden_states(loaded.model, [collator(chosen[:2]), collator(chosen[2:])], [0, 1])
    linear = torch.nn.Linear(means.shape[1], 4)
    inputs = []
    for layer in loaded.model.model.language_model.layers:
        layer.mlp.register_forward_pre_hook(lambda module, given: inputs.append(given[0]))
    for row, mean in zip(chosen, means, strict=True):
        inputs.clear()
        with torch.no_grad():
            batch = collator([row])
            batch.pop("labels")
            loaded.model(**batch)
            logits = torch.cat([linear(tokens[0]) for tokens in inputs])
        torch.testing.assert_close(linear(mean), logits.mean(0), rtol=1e-4, atol=1e-5)


def test_as_many_experts_as_modalities_are_needed(tiny, dense, tmp_path):
    moe = {"config": {"num_experts": 3}}
    recipe = tiny_recipe(
        tiny, "router", tmp_path / "r", "optim.max_steps=null", start_from=str(dense), moe=moe
    )
    with pytest.raises(
        ValueError, match=r"4 modalities \(CT, MR, US, histology\), but moe.config.num_experts is 3"
    ):
        train(recipe, show_progress=False)
