"""`--dry-run`: what it counts is what would be trained."""

import pytest
from typer.testing import CliRunner

from moellava.cli import app
from moellava.data import read_rows
from moellava.train.plan import plan
from moellava.train.prepare import prepare_model
from tests.train.tiny import parts_of, tiny_recipe


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
    monkeypatch.setattr("moellava.train.prepare.load_pretrained_model", None)
    monkeypatch.setattr("moellava.model.builder.assembly.model_from_tensors", None)
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


def test_a_set_of_the_hub_is_planned_with_its_splits(tiny, tmp_path, dataset_cache, no_network):
    """As docs/training.md has it for VQA-RAD."""
    vqa_rad = [f"data.{name}=flaviagiammarino/vqa-rad" for name in ("train", "evaluation")]
    splits = ["data.images=null", "data.train_split=train", "data.evaluation_split=test"]
    found = plan(tiny_recipe(tiny, "align", tmp_path / "out", *vqa_rad, *splits))
    held_out = len(read_rows("flaviagiammarino/vqa-rad", split="test"))
    assert found.num_rows == len(read_rows("flaviagiammarino/vqa-rad", split="train"))
    assert f"held-out rows {held_out}" in found.text


def test_the_command_plans_lists_and_says_what_is_wrong(tiny, tmp_path):
    runner = CliRunner()
    parts = [f"model.{key}={path}" for key, path in parts_of(tiny).items()]
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
    parts = [f"model.{key}={path}" for key, path in parts_of(tiny).items()]
    data = [
        f"data.train={tiny / 'rows.json'}",
        f"data.images={tiny / 'images'}",
        "data.num_workers=0",
    ]
    line = [
        "train",
        "stage1_align",
        *parts,
        *data,
        f"output_dir={tmp_path / 'out'}",
        "optim.max_steps=2",
        "optim.batch_size=4",
        "optim.per_device_batch_size=4",
    ]
    first = runner.invoke(app, line)
    assert first.exit_code == 0, first.output
    assert f"Model: {tmp_path / 'out' / 'model'}" in first.output
    assert "This run had finished" in runner.invoke(app, line).output
