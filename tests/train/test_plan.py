"""`--dry-run`: what it counts is what would be trained; its estimates against what autograd keeps and torch counts."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from typer.testing import CliRunner

from moellava.cli import app
from moellava.data import read_rows
from moellava.data.collate import ChatCollator
from moellava.train.plan import estimate_flops, estimate_memory, plan
from moellava.train.stages import prepare_model
from tests.train.tiny import tiny_recipe


@pytest.fixture
def recipe(tiny, tmp_path):
    return tiny_recipe(tiny, "tune", tmp_path / "out", "optim.max_steps=null", "optim.epochs=3")


def test_a_plan_counts_what_would_learn_and_the_steps(recipe):
    found = plan(recipe)
    model, _ = prepare_model(recipe)
    assert found.num_trained == sum(
        weight.numel() for weight in model.parameters() if weight.requires_grad
    )
    assert found.num_steps == 15  # 20 rows in batches of 4, 3 times
    assert (
        "model.language_model.layers.*.self_attn.q_proj.weight (32, 32)  in layers 0,1: 2,048"
        in found.text
    )
    assert "vision_tower" not in found.text


@pytest.mark.parametrize(
    ("stage", "more"),
    [
        ("align", {}),
        ("tune", {"lora": {"rank": 4, "alpha": 8}}),
        ("experts", {"moe": {"config": {"num_experts": 3, "meta_expert": True}}}),
        ("experts", {"moe": {"config": {"num_experts": 3}}, "lora": {"rank": 4, "alpha": 8}}),
        ("tune", {"trainable": ["vision_tower"]}),
    ],
    ids=["projector", "adapters", "experts", "adapters on experts", "tower"],
)
def test_a_plan_reads_no_weights_of_the_language_model_and_names_what_training_would_train(
    stage, more, tiny, tmp_path, monkeypatch
):
    recipe = tiny_recipe(tiny, stage, tmp_path / "out", **more)
    expected, _ = prepare_model(recipe)
    monkeypatch.setattr("moellava.train.stages.load_pretrained_model", None)
    monkeypatch.setattr("moellava.model.builder.assembly.load_weights", None)
    model, _ = prepare_model(recipe, on_meta=True)
    named = {
        name: (tuple(weight.shape), weight.dtype, weight.requires_grad)
        for name, weight in expected.named_parameters()
    }
    assert named == {
        name: (tuple(weight.shape), weight.dtype, weight.requires_grad)
        for name, weight in model.named_parameters()
    }
    assert all(weight.is_meta for weight in model.parameters())
    assert plan(recipe).num_trained == sum(
        weight.numel() for weight in expected.parameters() if weight.requires_grad
    )


def test_the_routers_plan_names_its_linear_layer(tiny, tmp_path):
    found = plan(
        tiny_recipe(tiny, "router", tmp_path / "out", "optim.max_steps=null", "optim.epochs=10")
    )
    assert found.num_trained == 4 * (32 + 1)
    assert found.num_steps == 50
    assert "router.weight (4, 32), router.bias (4,), for layers 0" in found.text


def test_a_set_of_the_hub_is_planned_with_its_splits(tiny, tmp_path, dataset_cache, no_network):
    """As docs/training.md has it for VQA-RAD."""
    vqa_rad = [f"data.{name}=flaviagiammarino/vqa-rad" for name in ("train", "evaluation")]
    splits = ["data.images=null", "data.train_split=train", "data.evaluation_split=test"]
    found = plan(tiny_recipe(tiny, "align", tmp_path / "out", *vqa_rad, *splits))
    held_out = len(read_rows("flaviagiammarino/vqa-rad", split="test"))
    assert found.num_rows == len(read_rows("flaviagiammarino/vqa-rad", split="train"))
    assert f"held-out rows {held_out}" in found.text


def batch_and_model(recipe, rows):
    model, loaded = prepare_model(recipe)
    data = read_rows(recipe.data.train, images=recipe.data.images)
    return ChatCollator(loaded.processor)([data[index] for index in rows]), model.train()


def test_the_activation_estimate_is_near_what_autograd_keeps(tiny, tmp_path):
    recipe = tiny_recipe(tiny, "tune", tmp_path / "out")
    batch, model = batch_and_model(recipe, [1, 2, 3, 5])
    longest = batch["input_ids"].shape[1]
    whole = kept_bytes(model, batch)
    estimate = estimate_memory(model, recipe, longest=longest)["activations"] * 2**30
    assert 1 < estimate / whole < 2  # the estimate has the gradient of the logits too

    model.activation_checkpointing_enable()
    checkpointed = tiny_recipe(
        tiny, "tune", tmp_path / "out", "optim.activation_checkpointing=true"
    )
    less = estimate_memory(model, checkpointed, longest=longest)["activations"] * 2**30
    assert kept_bytes(model, batch) < less < estimate


def kept_bytes(model, batch):
    """Of all storages that autograd saves in a forward pass, each once, weights left out."""
    weights = {weight.untyped_storage().data_ptr() for weight in model.parameters()}
    kept = {}

    def keep(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = (
                storage.nbytes(),
                tensor,
            )  # held, so that no address is used twice
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        model(**batch, use_cache=False)
    return sum(num_bytes for num_bytes, _ in kept.values())


@pytest.mark.parametrize("stage", ["align", "tune"])
def test_the_work_estimate_is_near_torchs_flop_counter(stage, tiny, tmp_path):
    recipe = tiny_recipe(tiny, stage, tmp_path / "out")
    batch, model = batch_and_model(recipe, [1, 1])
    with FlopCounterMode(display=False) as counter:
        model(**batch, use_cache=False).loss.backward()
    length = batch["input_ids"].shape[1]
    estimate = 2 * estimate_flops(model, recipe, length=length, images_per_row=1)
    assert estimate == pytest.approx(counter.get_total_flops(), rel=0.35)


def test_the_command_plans_lists_and_says_what_is_wrong(tiny, tmp_path):
    runner = CliRunner()
    parts = [f"model.{key}={tiny / name}" for key, name in
             (("model_name_or_path", "tinyllama_tiny"), ("mm_vision_tower", "biomedclip_tiny"))]  # fmt: skip
    data = [
        f"data.train={tiny / 'rows.json'}",
        f"data.images={tiny / 'images'}",
        f"output_dir={tmp_path / 'out'}",
    ]
    planned = runner.invoke(app, ["train", "stage1_align", *parts, *data, "--dry-run"])
    assert planned.exit_code == 0, planned.output
    assert "stage align: trains 3,136 of" in planned.output
    assert not (tmp_path / "out").exists()
    listed = runner.invoke(app, ["train", "--list"])
    assert "stage3_experts" in listed.output
    assert "fsdp2.yaml" in listed.output
    wrong = runner.invoke(app, ["train", "stage1_align", *parts, *data, "optim.lerning_rate=1"])
    assert wrong.exit_code == 1
    assert "Did you mean 'optim.learning_rate'?" in wrong.output


def test_the_command_trains_and_a_second_time_says_that_it_had_finished(tiny, tmp_path):
    runner = CliRunner()
    parts = [
        f"model.model_name_or_path={tiny / 'tinyllama_tiny'}",
        f"model.mm_vision_tower={tiny / 'biomedclip_tiny'}",
    ]
    data = [
        f"data.train={tiny / 'rows.json'}",
        f"data.images={tiny / 'images'}",
        "data.num_workers=0",
    ]
    line = ["train", "stage1_align", *parts, *data, f"output_dir={tmp_path / 'out'}", "optim.max_steps=2",
            "optim.batch_size=4", "optim.per_device_batch_size=4"]  # fmt: skip
    first = runner.invoke(app, line)
    assert first.exit_code == 0, first.output
    assert f"Model: {tmp_path / 'out' / 'model'}" in first.output
    assert "This run had finished" in runner.invoke(app, line).output
