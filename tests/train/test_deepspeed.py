"""DeepSpeed's ZeRO-2 and ZeRO-3 on two CPU processes give the losses and weights of one process.

CI does not install DeepSpeed, so these are run by hand: pip install deepspeed, then pytest this.
"""

import json
import os
import shutil
import subprocess
import sys

import pytest
import torch
import yaml
from safetensors.torch import load_file

from moellava.train import train
from moellava.train.options import recipe_to_dict
from moellava.train.recipe import FOLDER
from tests.train.tiny import tiny_recipe

pytest.importorskip("deepspeed")
pytestmark = pytest.mark.slow


def launch(config, recipe):
    environment = {**os.environ, "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"}
    words = ["accelerate.commands.accelerate_cli", "launch", "--config_file", str(config)]
    command = [sys.executable, "-m", *words, "-m", "moellava.cli", "train", str(recipe)]
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=False)


@pytest.mark.parametrize("stage", [2, 3])
def test_two_processes_give_the_losses_and_weights_of_one_and_resume(tiny, tmp_path, stage):
    config = yaml.safe_load((FOLDER.parent / f"accelerate/deepspeed_zero{stage}.yaml").read_text())
    config |= {"num_processes": 2, "mixed_precision": "no", "use_cpu": True}
    (tmp_path / "accelerate.yaml").write_text(yaml.safe_dump(config))
    one = train(tiny_recipe(tiny, "tune", tmp_path / "one", "optim.max_steps=5"))
    recipe = tiny_recipe(
        tiny, "tune", tmp_path / "two", "optim.max_steps=5", "optim.per_device_batch_size=2"
    )
    plain = json.loads(json.dumps(recipe_to_dict(recipe)))
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(plain))
    for is_resumed in (False, True):
        found = launch(tmp_path / "accelerate.yaml", tmp_path / "recipe.yaml")
        assert found.returncode == 0, found.stderr[-2000:]
        log = json.loads((tmp_path / "two" / "log.json").read_text())
        losses = [entry["loss"] for entry in log if "loss" in entry]
        assert losses == pytest.approx([e["loss"] for e in one.log if "loss" in e], abs=1e-5), (
            is_resumed
        )
        ours, theirs = (
            load_file(folder / "model.safetensors")
            for folder in (tmp_path / "two" / "model", one.model_folder)
        )
        assert ours.keys() == theirs.keys()
        for name, weight in ours.items():
            torch.testing.assert_close(weight, theirs[name], rtol=1e-4, atol=1e-5)
        # As if it had been killed behind step 4.
        shutil.rmtree(tmp_path / "two" / "model")
        shutil.rmtree(tmp_path / "two" / "checkpoint-5")
