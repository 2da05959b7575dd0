"""Adapters on any parts, and what they become."""

import pytest
import torch
from torch import nn

from moellava.data import read_rows
from moellava.data.collate import ChatCollator
from moellava.model.builder_enhanced import load_pretrained_model
from moellava.train import lora_config, train
from moellava.train.parts import FINEST, part_of
from moellava.train.prepare import build_model
from tests.train.tiny import experts_recipe, losses, parts_of, tiny_recipe

pytestmark = pytest.mark.usefixtures("quick_runs")


@pytest.mark.parametrize("stage", ["tune", "experts"])
def test_adapters_learn_and_are_merged_into_an_ordinary_model(stage, tiny, dense, tmp_path):
    from peft import PeftModel

    lora = {"rank": 4, "alpha": 8}
    if stage == "tune":
        recipe = tiny_recipe(tiny, "tune", tmp_path / "out", "optim.learning_rate=5e-2", lora=lora)
    else:
        recipe = experts_recipe(
            tiny, dense, tmp_path / "out", "optim.learning_rate=5e-2", lora=lora
        )
    result = train(recipe, show_progress=False)
    assert losses(result)[-1] < losses(result)[0] - 0.15
    merged = load_pretrained_model(result.model_folder, dtype="float32")
    rows = read_rows(str(tiny / "rows.json"), images=tiny / "images")
    batch = ChatCollator(merged.processor)([rows[1], rows[2]])
    # PEFT's own reading of the adapter, on the base that it was trained on.

    base = build_model(recipe).model
    adapted = PeftModel.from_pretrained(base, str(tmp_path / "out" / "adapter"))
    with torch.no_grad():
        torch.testing.assert_close(
            merged.model(**batch).logits, adapted.eval()(**batch).logits, rtol=1e-4, atol=1e-4
        )


def test_adapters_with_checkpointed_activations_have_the_same_losses(tiny, tmp_path):
    plain, checkpointed = (
        losses(
            train(
                tiny_recipe(
                    tiny,
                    "tune",
                    tmp_path / name,
                    "optim.max_steps=3",
                    *more,
                    lora={"rank": 4, "alpha": 8},
                ),
                show_progress=False,
            )
        )
        for name, more in (
            ("plain", ()),
            ("checkpointed", ("optim.activation_checkpointing=true",)),
        )
    )
    assert checkpointed == pytest.approx(plain, rel=1e-5)


def test_dropout_on_experts_is_refused(tiny, dense, tmp_path):
    with pytest.raises(
        ValueError, match=r"PEFT has no dropout for fused experts. Set lora.dropout=0"
    ):
        train(
            experts_recipe(tiny, dense, tmp_path / "x", lora={"dropout": 0.1}), show_progress=False
        )


@pytest.fixture
def mixture(tiny):
    """One layer of two is a mixture, with a meta expert and a router that learns."""
    return load_pretrained_model(
        parts_of(tiny),
        moe_config={"num_experts": 2, "moe_layers": [1], "meta_expert": True},
        dtype="float32",
    )


def one_step(loaded, tiny, adapted):
    """Names of the weights whose values one step of SGD changes."""
    rows = read_rows(str(tiny / "rows.json"), images=tiny / "images")
    batch = ChatCollator(loaded.processor)([rows[1], rows[2]])
    for name, weight in adapted.named_parameters():
        if "lora_" in name:
            nn.init.normal_(weight, std=0.1)  # one of two is zero at first, as is the other's step
    before = {name: weight.clone() for name, weight in adapted.named_parameters()}
    adapted.train()
    adapted(**batch).loss.backward()
    torch.optim.SGD(adapted.parameters(), lr=1.0).step()
    return {
        name for name, weight in adapted.named_parameters() if not torch.equal(weight, before[name])
    }


SETS = [
    ["vision_tower"],
    ["projector", "attention"],
    ["router", "experts", "meta_expert"],
    ["embeddings", "mlp"],
    ["language_model"],
]


@pytest.mark.parametrize("parts", SETS, ids="-".join)
def test_adapters_of_these_parts_learn_and_nothing_else(parts, mixture, tiny):
    from peft import get_peft_model

    adapted = get_peft_model(mixture.model, lora_config(mixture.model, parts, rank=2, alpha=4))
    expected = set(parts)
    if parts == ["language_model"]:
        expected = {"attention", "mlp", "meta_expert", "experts"}
    learning = {name for name, weight in adapted.named_parameters() if weight.requires_grad}
    assert {part_of(name) for name in learning} == expected
    assert all("lora_" in name for name in learning)
    assert one_step(mixture, tiny, adapted) == learning


def test_parts_stay_whole_beside_adapters(mixture, tiny):
    from peft import get_peft_model

    whole = ["projector", "router", "norms"]
    config = lora_config(
        mixture.model,
        ["vision_tower", "experts"],
        rank=2,
        whole=whole,
        tower_blocks=1,
    )
    adapted = get_peft_model(mixture.model, config)
    changed = one_step(mixture, tiny, adapted)
    assert {part_of(name) for name in changed} == {"vision_tower", "experts", *whole}
    assert {part_of(name) for name in changed if "lora_" not in name} == set(whole)
    assert len({name.split("blocks.")[1][0] for name in changed if "blocks." in name}) == 1


def test_what_pefts_all_linear_touches(mixture):
    """Not experts, routers, embeddings; but blocks of the tower that do not run."""
    from peft import LoraConfig, get_peft_model

    adapted = get_peft_model(mixture.model, LoraConfig(r=2, target_modules="all-linear"))
    names = [name for name, weight in adapted.named_parameters() if weight.requires_grad]
    assert {part_of(name) for name in names} == {
        "vision_tower", "projector", "attention", "mlp", "meta_expert",
    }  # fmt: skip
    last = max(int(name.split("blocks.")[1].split(".")[0]) for name in names if "blocks." in name)
    ours = lora_config(mixture.model, ["vision_tower"], rank=2).target_modules
    assert f"blocks\\.{last}\\." not in ours
    assert not set(FINEST) - {part_of(name) for name, _ in mixture.model.named_parameters()}


@pytest.mark.parametrize(
    ("parts", "options", "message"),
    [
        (["expert"], {}, r"Unknown part in lora.parts: 'expert'. Did you mean 'experts'"),
        (["norms"], {}, r"'norms', which has no linear layer to adapt. Leave it out"),
        (["router"], {"dropout": 0.1}, r"no dropout for fused router. Set lora.dropout=0"),
        (["mlp"], {"whole": ["mlp"]}, r"mlp: choose adapters, or train it whole"),
        (["vision_tower"], {"tower_blocks": 99}, r"tower_blocks is 99, but \d+ blocks"),
    ],
)
def test_adapters_that_cannot_be(parts, options, message, mixture):
    with pytest.raises(ValueError, match=message):
        lora_config(mixture.model, parts, **options)


def test_a_recipe_with_adapters_on_the_tower_and_the_projector_whole(tiny, tmp_path):
    """What is saved is the ordinary model in which exactly these parts have moved."""
    recipe = tiny_recipe(
        tiny,
        "tune",
        tmp_path / "out",
        "optim.max_steps=2",
        "trainable=[vision_tower,projector,attention]",
        "tower_blocks=1",
        lora={"rank": 2, "alpha": 4, "parts": ["vision_tower", "attention"]},
    )
    result = train(recipe, show_progress=False)
    moved = {row["part"]: row["moved"] for row in result.log[-1]["moved"]}
    assert {part for part, far in moved.items() if far} == {
        "vision_tower", "projector", "attention",
    }  # fmt: skip
    before = build_model(recipe).model.state_dict()
    after = load_pretrained_model(result.model_folder, dtype="float32").model.state_dict()
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert {part_of(name) for name in changed} == {"vision_tower", "projector", "attention"}


def test_adapters_on_what_does_not_learn_are_refused(tiny, tmp_path):
    recipe = tiny_recipe(
        tiny, "tune", tmp_path / "out", "trainable=[projector]", lora={"parts": ["attention"]}
    )
    with pytest.raises(ValueError, match=r"lora.parts names attention, which trainable does not"):
        train(recipe, show_progress=False)
    recipe = tiny_recipe(tiny, "tune", tmp_path / "out", "trainable=[projector]", "lora.rank=2")
    with pytest.raises(ValueError, match=r"Name the parts that get adapters in lora.parts"):
        train(recipe, show_progress=False)
