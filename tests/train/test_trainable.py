"""Which weights learn."""

import pytest

from moellava.model.builder_enhanced import load_pretrained_model
from moellava.train.plan import plan
from moellava.train.trainable import set_trainable
from tests.train.tiny import tiny_recipe


@pytest.mark.parametrize(
    ("parts", "message"),
    [
        (["projektor"], r"Unknown part in trainable: 'projektor'. Did you mean 'projector'\?"),
        (
            ["experts"],
            r"names 'experts', but the model has no such weights. It has: vision_tower, projector",
        ),
    ],
)
def test_parts_that_cannot_be_trained_are_named(parts, message, chain):
    model = load_pretrained_model(chain / "tune" / "model").model
    with pytest.raises(ValueError, match=message):
        set_trainable(model, parts)


def test_a_trained_tower_leaves_out_the_blocks_that_do_not_run(chain):
    model = load_pretrained_model(chain / "tune" / "model").model
    set_trainable(model, ["vision_tower"])
    learning = {name for name, weight in model.named_parameters() if weight.requires_grad}
    assert any("blocks.0." in name for name in learning)
    last = max(
        int(name.split("blocks.")[1].split(".")[0])
        for name, _ in model.named_parameters()
        if "blocks." in name
    )
    assert not any(f"blocks.{last}." in name for name in learning)


def learning(model):
    return {name for name, weight in model.named_parameters() if weight.requires_grad}


def test_the_last_blocks_of_a_tower_are_the_last_that_run(chain):
    model = load_pretrained_model(chain / "tune" / "model").model
    set_trainable(model, ["vision_tower"])
    running = {name for name in learning(model) if "blocks." in name}
    numbers = sorted({int(name.split("blocks.")[1].split(".")[0]) for name in running})
    set_trainable(model, ["vision_tower", "projector"], tower_blocks=1)
    last = {name for name in running if f"blocks.{numbers[-1]}." in name}
    projector = {name for name, _ in model.named_parameters() if "multi_modal_projector" in name}
    assert learning(model) == last | projector
    set_trainable(model, ["vision_tower"], tower_blocks=len(numbers))
    assert learning(model) == running


def test_blocks_that_a_tower_does_not_have(chain):
    model = load_pretrained_model(chain / "tune" / "model").model
    with pytest.raises(ValueError, match=r"tower_blocks is 99, but \d+ blocks of the tower run"):
        set_trainable(model, ["vision_tower"], tower_blocks=99)
    with pytest.raises(ValueError, match=r"trainable does not name 'vision_tower'.*Add it"):
        set_trainable(model, ["projector"], tower_blocks=1)


def test_a_recipe_says_how_many_blocks_learn(tiny, tmp_path):
    whole, last = (
        plan(tiny_recipe(tiny, "align", tmp_path, "trainable=[vision_tower]", *more)).num_trained
        for more in ((), ("tower_blocks=1",))
    )
    assert 0 < last < whole
