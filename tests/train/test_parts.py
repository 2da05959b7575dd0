"""Every weight is of one part."""

import re

import pytest
from torch import nn

from moellava.model.builder_enhanced import load_pretrained_model
from moellava.train.parts import FINEST, PARTS, is_of, part_of
from tests.train.tiny import parts_of


def test_every_weight_is_of_exactly_one_of_the_finest_parts(tiny):
    model = load_pretrained_model(
        parts_of(tiny), moe_config={"num_experts": 2, "moe_layers": [1], "meta_expert": True}
    ).model
    found = set()
    for name, _ in model.named_parameters():
        assert [part for part in FINEST if is_of(name, part)] == [part_of(name)]
        assert is_of(name, "language_model") == ("vision" not in name and "projector" not in name)
        found.add(part_of(name))
    assert found == set(FINEST)


@pytest.mark.parametrize(
    ("name", "part"),
    [
        ("base_model.model.model.vision_tower.blocks.0.mlp.fc1.lora_A.default.weight",
         "vision_tower"),
        ("base_model.model.model.multi_modal_projector.modules_to_save.default.0.weight",
         "projector"),
        ("base_model.model.model.language_model.layers.1.mlp.experts.base_layer.lora_A.default.weight",
         "experts"),
        ("model.language_model.layers.0.self_attn.q_norm.weight", "attention"),
        ("model.language_model.layers.0.pre_feedforward_layernorm.weight", "norms"),
        ("model.language_model.layers.0.mlp.gate_up_proj.weight", "mlp"),
        ("model.language_model.layers.0.something.weight", "language_model"),
    ],
)  # fmt: skip
def test_names_of_peft_and_of_other_families(name, part):
    assert part_of(name) == part


def test_a_weight_of_another_model_is_an_error():
    name = next(name for name, _ in nn.Sequential(nn.Linear(2, 2)).named_parameters())
    with pytest.raises(ValueError, match=rf"{re.escape(name)}.*Known: {next(iter(PARTS))}"):
        part_of(name)
