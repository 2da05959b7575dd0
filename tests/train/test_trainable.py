"""Which weights learn, and what adapters become."""

import pytest
import torch

from moellava.data import read_rows
from moellava.data.collate import ChatCollator
from moellava.model.builder_enhanced import load_pretrained_model
from moellava.train import train
from moellava.train.prepare import build_model
from moellava.train.trainable import set_trainable
from tests.train.tiny import experts_recipe, losses, tiny_recipe

pytestmark = pytest.mark.usefixtures("quick_runs")


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
