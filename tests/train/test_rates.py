"""Learning rates of parts; the oracle is SGD, whose steps are the rate times the gradient."""

import pytest
import torch

from moellava.train import load_recipe, train
from moellava.train.parts import part_of
from moellava.train.plan import plan
from moellava.train.prepare import build_model
from tests.train.tiny import model_weights, tiny_recipe

pytestmark = pytest.mark.usefixtures("quick_runs")

SGD = (
    "optim.optimizer=sgd",
    "optim.max_steps=1",
    "optim.learning_rate=0.125",
    "optim.schedule=constant",
    "optim.warmup=0",
    "trainable=[vision_tower,projector,language_model]",
)


def steps_of(recipe):
    start = build_model(recipe).model.state_dict()
    end = model_weights(train(recipe, show_progress=False))
    return {name: end[name] - weight for name, weight in start.items()}


@pytest.mark.parametrize("lora", [None, {"rank": 2, "alpha": 4}], ids=["whole", "adapters"])
def test_each_part_steps_by_its_own_rate(lora, tiny, tmp_path):
    """A factor of two is exact; adapters' products are not, so theirs are looked at by zero."""
    rates = {"projector": 0.25, "language_model": 0.5, "attention": 0.0625, "vision_tower": 0.0}
    plain = steps_of(tiny_recipe(tiny, "tune", tmp_path / "plain", *SGD, lora=lora))
    rated = steps_of(
        tiny_recipe(
            tiny,
            "tune",
            tmp_path / "rated",
            *SGD,
            *(f"optim.rates.{part}={rate}" for part, rate in rates.items()),
            lora=lora,
        )
    )
    factors = {"projector": 2, "attention": 0.5, "vision_tower": 0}
    for name, step in plain.items():
        if "rotary" in name or (lora and "language_model" in name):
            continue
        factor = factors.get(part_of(name), 4)
        torch.testing.assert_close(rated[name], factor * step, rtol=1e-3, atol=1e-6)
    assert any(step.abs().max() > 1e-4 for name, step in plain.items() if "projector" in name)


def test_a_rate_is_kept_when_a_run_resumes(tiny, tmp_path):
    """Killed after its second step, the run ends with the weights of one that was not."""
    import shutil

    settings = ("optim.rates={projector: 0.1}", "optim.max_steps=4", "saving.every=2")
    whole = train(tiny_recipe(tiny, "tune", tmp_path / "whole", *settings), show_progress=False)
    recipe = tiny_recipe(tiny, "tune", tmp_path / "killed", *settings)
    result = train(recipe, show_progress=False)
    shutil.rmtree(result.model_folder)
    shutil.rmtree(tmp_path / "killed" / "checkpoint-4")
    again = model_weights(train(recipe, show_progress=False))
    for name, weight in model_weights(whole).items():
        assert torch.equal(weight, again[name])


def test_a_rate_of_what_does_not_learn_names_what_does(tiny, tmp_path):
    recipe = tiny_recipe(tiny, "tune", tmp_path / "out", "optim.rates={router: 1e-3}")
    message = (
        r"a rate for 'router', of which nothing learns by it. What learns: attention, embeddings, "
        r"mlp, norms, projector. Add 'router' to trainable, or leave its rate out"
    )
    for run in (plan, train):
        with pytest.raises(ValueError, match=message):
            run(recipe)


def test_an_unknown_part_and_a_negative_rate(tiny, tmp_path):
    recipe = tiny_recipe(tiny, "tune", tmp_path / "out", "optim.rates={projektor: 1e-3}")
    with pytest.raises(ValueError, match=r"optim.rates: 'projektor'. Did you mean 'projector'"):
        plan(recipe)
    with pytest.raises(ValueError, match=r"optim.rates.*0 or more"):
        load_recipe("stage2_tune", ["optim.rates.projector=-1"])


def test_features_of_a_tower_that_learns_are_refused():
    with pytest.raises(ValueError, match=r"keeps what a frozen tower gives.*Leave data.features"):
        load_recipe("stage1_align", ["trainable=[vision_tower]", "data.features=kept"])
