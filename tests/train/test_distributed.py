"""Two gloo processes give the losses and model of one: accelerate's DDP, torch's FSDP2."""

import json
import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file

from moellava.train import train
from moellava.train.arguments import training_arguments
from moellava.train.options import recipe_to_dict
from moellava.train.recipe import FOLDER, load_recipe
from tests.train.results import losses_of, rows_of, said_by, status_of, weights_of
from tests.train.tiny import tiny_recipe

ROOT = Path(__file__).parents[2]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("two", "one"),
    [
        ("ddp", "one"),
        ("fsdp2", "one"),
        ("fsdp2 adapters", "one with adapters"),
        ("fsdp2 experts adapters", "one experts adapters"),
        ("two with features", "one aligned"),
    ],
)
def test_two_processes_give_the_losses_and_weights_of_one(two, one, runs):
    assert status_of(runs, two)["ended"] == 0, said_by(runs, two)
    ours, theirs = (dict(losses_of(runs, name)) for name in (two, one))
    assert len(theirs) == 5
    assert ours == pytest.approx(theirs, abs=1e-4)
    assert theirs[5] < theirs[1] - 0.005
    ours, theirs = weights_of(runs, two), weights_of(runs, one)
    assert ours.keys() == theirs.keys()
    for name, weight in ours.items():
        torch.testing.assert_close(weight, theirs[name], rtol=1e-3, atol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("parallel", ["ddp", "fsdp2"])
def test_a_process_without_an_image_trains_the_projector_as_one_process_does(parallel, runs):
    two, one = f"{parallel} without images", "one without images"
    assert status_of(runs, two)["ended"] == 0, said_by(runs, two)
    batches = [batch for steps in rows_of(runs, two) for step in steps.values() for batch in step]
    assert ["row0"] in batches  # one of the rows without an image, alone on its process
    assert ["row4"] in batches
    ours, theirs = (dict(losses_of(runs, name)) for name in (two, one))
    assert len(theirs) == 5
    assert ours == pytest.approx(theirs, abs=1e-5)
    ours, theirs = weights_of(runs, two), weights_of(runs, one)
    for name, weight in ours.items():
        torch.testing.assert_close(weight, theirs[name], rtol=1e-4, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("two", ["ddp", "fsdp2", "fsdp2 experts adapters"])
def test_two_processes_give_the_held_out_loss_and_answers_of_one(two, runs):
    one = "one experts adapters" if "adapters" in two else "one"
    ours, theirs = (json.loads((runs / name / "log.json").read_text()) for name in (two, one))
    losses = [
        [entry["eval_loss"] for entry in log if "eval_loss" in entry] for log in (ours, theirs)
    ]
    assert losses[0] == pytest.approx(losses[1], abs=1e-4)
    answers = [[entry["answers"] for entry in log if "answers" in entry] for log in (ours, theirs)]
    assert answers[0] == answers[1]
    assert [answer["id"] for answer in answers[0][0]] == ["row0", "row1"]
    scores = [[e["eval_token_f1_f1"] for e in log if "answers" in e] for log in (ours, theirs)]
    assert scores[0] == scores[1]
    assert len(scores[0]) == 2


@pytest.mark.slow
def test_two_processes_log_the_routers_load_over_both(runs):
    logs = [
        next(
            entry for entry in json.loads((runs / name / "log.json").read_text()) if "load" in entry
        )
        for name in ("ddp", "fsdp2", "one")
    ]
    for log in logs[:2]:
        for kind in ("image", "text"):
            torch.testing.assert_close(
                *(torch.tensor(each["load"][kind]) for each in (log, logs[2])), atol=1e-3, rtol=0
            )
        assert log["aux_loss"] == pytest.approx(
            logs[2]["aux_loss"], abs=0.1
        )  # a mean of two batches' own


@pytest.mark.slow
def test_adapters_of_a_sharded_run_are_peft_s_own_and_make_the_saved_model(runs):
    """PEFT reads the adapter folder on the dense start, and gives the weights saved as `model`."""
    from peft import PeftModel

    from moellava.model.builder_enhanced import load_pretrained_model
    from tests.train.tiny import parts_of

    base = load_pretrained_model(parts_of(runs / "tiny"), moe_config=False, dtype="float32").model
    merged = (
        PeftModel.from_pretrained(base, str(runs / "fsdp2 adapters" / "adapter"))
        .merge_and_unload()
        .state_dict()
    )
    saved = weights_of(runs, "fsdp2 adapters")
    for name, weight in saved.items():
        torch.testing.assert_close(merged[name], weight)
    untouched = load_pretrained_model(
        parts_of(runs / "tiny"), moe_config=False, dtype="float32"
    ).model.state_dict()
    assert not torch.allclose(
        untouched["model.language_model.layers.0.self_attn.q_proj.weight"],
        saved["model.language_model.layers.0.self_attn.q_proj.weight"],
    )


@pytest.mark.slow
def test_nan_on_one_of_two_sharded_processes_stops_both_and_names_its_rows(runs):
    assert status_of(runs, "NaN on the second process")["killed"] == 1
    said = (runs / "NaN on the second process.1.txt").read_text()
    assert "FloatingPointError: The loss of step 3 is not finite" in said
    assert "Rows of the batch: ['row" in said
    assert "The last good checkpoint is none" in said


COMMANDS = [
    line.strip()
    for line in (ROOT / "docs" / "training.md").read_text().splitlines()
    if line.startswith(("    accelerate launch", "    torchrun"))
]
LAUNCHERS = {
    "accelerate launch": "accelerate.commands.launch --main_process_port 0",
    "torchrun": "torch.distributed.run --standalone",
}


@pytest.mark.slow
@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_the_documented_commands_run_on_two_processes(launcher, tiny, tmp_path):
    """As written, but for the recipe, which names tiny parts and data, and a free port."""
    (command,) = (line for line in COMMANDS if line.startswith(launcher) and " 2 " in line)
    options, _, settings = command.removeprefix(launcher).partition(" stage1_align ")
    out = tmp_path / "out"
    more = [word for word in settings.split() if word.startswith("parallel=")]
    recipe = tiny_recipe(
        tiny,
        "align",
        out,
        "optim.max_steps=1",
        "saving.every=1",
        "optim.per_device_batch_size=2",
        *more,
    )
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe_to_dict(recipe)))
    done = subprocess.run(
        [
            sys.executable,
            "-m",
            *shlex.split(f"{LAUNCHERS[launcher]} {options}"),
            str(tmp_path / "recipe.yaml"),
        ],
        capture_output=True,
        text=True,
        timeout=200,
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr[-4000:]
    assert done.stdout.count(f"Model: {out / 'model'}") == 1
    assert load_file(out / "model" / "model.safetensors")
    assert (out / "checkpoint-1" / "rng_state_1.pth").is_file()  # the second's random numbers


def test_the_documented_recipes_and_configs_exist():
    assert len(COMMANDS) == 5
    for command in COMMANDS:
        for word in shlex.split(command):
            if word.startswith("stage"):
                load_recipe(word)
            if word.endswith(".yaml"):
                assert (FOLDER.parent / "accelerate" / Path(word).name).is_file()


def test_accelerates_fsdp_on_a_cpu_is_refused(tiny, tmp_path, monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    with pytest.raises(
        ValueError, match=r"no FSDP without a GPU and would run DDP instead. Use parallel=fsdp2"
    ):
        train(tiny_recipe(tiny, "tune", tmp_path / "out"), show_progress=False)


def test_fsdp2_in_one_process_is_refused(tiny, tmp_path):
    with pytest.raises(ValueError, match=r"parallel=fsdp2 needs several processes: torchrun"):
        train(tiny_recipe(tiny, "tune", tmp_path / "out", "parallel=fsdp2"), show_progress=False)


@pytest.mark.parametrize(
    ("environment", "settings", "error", "message"),
    [
        ({}, [], ImportError, "DeepSpeed, which is not installed"),
        ({}, ["parallel=fsdp2"], ValueError, "parallel=fsdp2 shards by itself"),
        (
            {"ACCELERATE_DEEPSPEED_ZERO_STAGE": "3"},
            ["lora.rank=2"],
            ValueError,
            "ZeRO-3 could not be merged whole",
        ),
        (
            {"ACCELERATE_DEEPSPEED_ZERO_STAGE": "3"},
            [],
            ValueError,
            "would save pieces of the weights and no model. Set zero3_save_16bit_model: true",
        ),
    ],
)
def test_engines_that_cannot_keep_the_promise_are_refused(
    environment, settings, error, message, tiny, tmp_path
):
    from unittest import mock

    available = mock.patch(
        "moellava.train.arguments.is_deepspeed_available", return_value=error is not ImportError
    )
    environment |= {"ACCELERATE_USE_DEEPSPEED": "true"}
    with mock.patch.dict(os.environ, environment), available, pytest.raises(error, match=message):
        training_arguments(tiny_recipe(tiny, "tune", tmp_path / "out", *settings))


def test_the_router_is_fitted_in_one_process(tiny, tmp_path, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    recipe = tiny_recipe(tiny, "router", tmp_path / "out", "optim.max_steps=null")
    with pytest.raises(ValueError, match=r"in one process. Start it by moellava train alone"):
        train(recipe, show_progress=False)


def test_the_accelerate_configs_are_read_by_accelerate():
    from accelerate.commands.config.config_args import load_config_from_file

    kinds = {
        path.stem: load_config_from_file(str(path))
        for path in (FOLDER.parent / "accelerate").glob("*.yaml")
    }
    assert {name: str(config.distributed_type.value) for name, config in kinds.items()} == {
        "ddp": "MULTI_GPU",
        "fsdp2": "FSDP",
        "deepspeed_zero2": "DEEPSPEED",
        "deepspeed_zero3": "DEEPSPEED",
    }
    assert kinds["deepspeed_zero3"].deepspeed_config["zero3_save_16bit_model"] is True


@pytest.mark.parametrize("stage", ["tune", "experts"])
def test_accelerates_fsdp_would_wrap_each_decoder_layer(stage, tiny, tmp_path):
    """Its own policy: no config can name the layers, which in a mixture are of another class."""
    from accelerate import FullyShardedDataParallelPlugin
    from accelerate.utils.fsdp_utils import fsdp2_prepare_auto_wrap_policy

    from moellava.train.prepare import prepare_model
    from moellava.train.sharding import decoder_layer_class

    moe = {"moe": {"config": {"num_experts": 2}}} if stage == "experts" else {}
    model, _ = prepare_model(tiny_recipe(tiny, stage, tmp_path, **moe), on_meta=True)
    config = yaml.safe_load((FOLDER.parent / "accelerate" / "fsdp2.yaml").read_text())[
        "fsdp_config"
    ]
    assert "fsdp_transformer_layer_cls_to_wrap" not in config
    plugin = FullyShardedDataParallelPlugin(
        fsdp_version=2, auto_wrap_policy=config["fsdp_auto_wrap_policy"].lower()
    )
    plugin.transformer_cls_names_to_wrap = [decoder_layer_class(model)]
    is_wrapped = fsdp2_prepare_auto_wrap_policy(plugin, model)
    assert [name for name, module in model.named_modules() if is_wrapped(module)] == [
        "model.language_model.layers.0", "model.language_model.layers.1",
    ]  # fmt: skip
