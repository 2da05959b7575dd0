"""Where NaN or infinity began."""

import pytest
import torch
from torch import nn

from moellava.train import train
from moellava.train.nonfinite import first_nonfinite_module, nonfinite_tensors
from moellava.train.trainer import MoeLlavaTrainer
from tests.train.tiny import experts_recipe

pytestmark = pytest.mark.usefixtures("quick_runs")


def test_a_nan_that_arises_in_computing_names_the_first_module(tiny, dense, tmp_path, monkeypatch):

    own = MoeLlavaTrainer._init_training_state

    def spoil(self, *args):
        mlp = self.loaded.model.model.language_model.layers[1].input_layernorm
        mlp.register_forward_hook(lambda module, inputs, output: output * float("nan"))
        return own(self, *args)

    monkeypatch.setattr(MoeLlavaTrainer, "_init_training_state", spoil)
    with pytest.raises(
        FloatingPointError,
        match=r"first output .* is that of model.language_model.layers.1.input_layernorm",
    ):
        train(experts_recipe(tiny, dense, tmp_path / "out"), show_progress=False)


def test_the_first_module_is_the_one_that_computed_it_first():
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2), nn.Linear(2, 2))
    assert first_nonfinite_module(model, {"input": torch.ones(1, 2)}) is None
    model[1].weight.data[0, 0] = float("nan")
    assert first_nonfinite_module(model, {"input": torch.ones(1, 2)}) == "1"


def test_the_tensors_that_hold_some_are_named_up_to_a_limit():
    bad, good = torch.tensor([1.0, float("inf")]), torch.ones(2)
    named = [("a", bad), ("b", good), ("c", None), ("d", torch.ones(2, dtype=torch.long))]
    assert nonfinite_tensors(named) == ["a"]
    assert nonfinite_tensors([(str(index), bad) for index in range(5)], limit=2) == ["0", "1"]
