"""Two gloo processes give the losses and the model of one: DDP through accelerate, FSDP2 through torch."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file

from moellava.train import train
from moellava.train.recipe import recipe_to_dict
from tests.train.tiny import tiny_recipe

ROOT = Path(__file__).parents[2]
# A batch of four rows: at once, or two on each of two processes. The balancing loss is not linear in the rows.
SETTINGS = ("optim.max_steps=4", "data.group_by_length=false", "moe.config.router_aux_loss_coef=0")


@pytest.fixture(scope="module")
def dense(tiny, tmp_path_factory):
    out = tmp_path_factory.mktemp("dense") / "run"
    train(tiny_recipe(tiny, "tune", out, "optim.max_steps=1"), show_progress=False)
    return out


def recipe_of(tiny, dense, out, *overrides):
    moe = {"config": {"num_experts": 4}}
    return tiny_recipe(tiny, "experts", out, *SETTINGS, *overrides, start_from=str(dense), moe=moe)


@pytest.fixture(scope="module")
def single(tiny, dense, tmp_path_factory):
    return train(recipe_of(tiny, dense, tmp_path_factory.mktemp("single") / "run"), show_progress=False)


def launch(recipe, folder, **environment):
    """`moellava train` on two processes."""
    folder.mkdir(exist_ok=True)
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe_to_dict(recipe)))
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    return subprocess.run(
        [*command, "-m", "moellava.cli", "train", str(folder / "recipe.yaml")],
        capture_output=True, text=True, timeout=300,
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", **environment},
    )  # fmt: skip


def errors(done):
    lines = done.stderr.splitlines()
    said = [line for line in lines if "error" in line.lower()]
    return "\n".join([*said[:20], *lines[:60]])


def losses(log):
    return [entry["loss"] for entry in log if "loss" in entry]


@pytest.mark.slow
@pytest.mark.parametrize("parallel", ["ddp", "fsdp2"])
def test_two_processes_give_the_losses_and_weights_of_one(parallel, tiny, dense, single, tmp_path):
    out = tmp_path / "run"
    recipe = recipe_of(tiny, dense, out, "optim.per_device_batch_size=2", f"parallel={parallel}")
    done = launch(recipe, tmp_path / "recipe")
    assert done.returncode == 0, errors(done)
    log = json.loads((out / "log.json").read_text())
    assert losses(log) == pytest.approx(losses(single.log), abs=1e-4)
    loads = [torch.tensor(entry["load"]["text"]) for entry in (log[0], single.log[0])]
    torch.testing.assert_close(*loads, atol=1e-3, rtol=0)
    ours, theirs = (load_file(path / "model.safetensors") for path in (out / "model", single.model_folder))
    assert ours.keys() == theirs.keys()
    for name, weight in ours.items():
        torch.testing.assert_close(weight, theirs[name], rtol=1e-2, atol=2e-3)
    if parallel == "fsdp2":  # the last checkpoint holds whole weights, and goes on from there
        (out / "model" / "model.safetensors").unlink()
        (out / "model").rename(tmp_path / "moved")
        (out / "checkpoint-4").rename(tmp_path / "checkpoint-4")
        again = launch(recipe, tmp_path / "recipe")
        assert again.returncode == 0, errors(again)
        resumed = load_file(out / "model" / "model.safetensors")
        assert all(torch.equal(resumed[name], ours[name]) for name in ours)


@pytest.mark.slow
def test_accelerates_fsdp_on_a_cpu_is_refused(tiny, dense, tmp_path, monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    with pytest.raises(ValueError, match=r"no FSDP without a GPU and would run DDP instead. Use parallel=fsdp2"):
        train(recipe_of(tiny, dense, tmp_path / "out"), show_progress=False)


def test_the_accelerate_configs_are_read_by_accelerate():
    from accelerate.commands.config.config_args import load_config_from_file

    from moellava.train.recipe import FOLDER

    kinds = {path.stem: load_config_from_file(str(path)) for path in (FOLDER.parent / "accelerate").glob("*.yaml")}
    assert {name: str(config.distributed_type.value) for name, config in kinds.items()} == {
        "ddp": "MULTI_GPU", "fsdp2": "FSDP", "deepspeed_zero2": "DEEPSPEED",
    }  # fmt: skip
