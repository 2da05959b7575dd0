"""Trains a tiny mixture again and again, each time in a forked child that kills itself at another moment.

python kill_worker.py FOLDER: writes FOLDER/<moment>/ with the run that was gone on with. Started by test_resume.
"""

import json
import os
import shutil
import signal
import sys
from pathlib import Path
from unittest import mock

import torch

from moellava.train import checkpoints, run
from moellava.train.trainer import MoeLlavaTrainer
from tests.train.tiny import tiny_recipe, write_tiny


def die(*args, **kwargs):
    os.kill(os.getpid(), signal.SIGKILL)


def at_step(step):
    """In the forward pass of the step behind `step`."""
    own = MoeLlavaTrainer.compute_loss

    def compute_loss(self, *args, **kwargs):
        if self.state.global_step == step:
            die()
        return own(self, *args, **kwargs)

    return mock.patch.object(MoeLlavaTrainer, "compute_loss", compute_loss)


def at_call(owner, name, number, after=False):
    """Before, or after, the `number`-th call of a function."""
    own, calls = getattr(owner, name), []

    def function(*args, **kwargs):
        calls.append(args)
        if len(calls) == number and not after:
            die()
        result = own(*args, **kwargs)
        if len(calls) == number:
            die()
        return result

    return mock.patch.object(owner, name, function)


def half_deleted():
    """When the deletion of an old checkpoint has removed some of its files."""

    def rmtree(path, **kwargs):
        if "deleted-checkpoint" in str(path):
            next(Path(path).glob("*.safetensors")).unlink()
            die()
        own(path, **kwargs)

    own = shutil.rmtree
    return mock.patch.object(checkpoints.shutil, "rmtree", rmtree)


MOMENTS = {
    "before the first checkpoint": lambda: at_step(1),
    "in a step of the first epoch": lambda: at_step(3),
    "in a step of the second epoch": lambda: at_step(7),
    "while a checkpoint is written": lambda: at_call(MoeLlavaTrainer, "_save_scaler", 2),
    "before a checkpoint is moved": lambda: at_call(checkpoints.os, "rename", 2),
    "after a checkpoint is moved": lambda: at_call(checkpoints.os, "rename", 2, after=True),
    "while an old checkpoint is deleted": half_deleted,
    "while the model is written": lambda: at_call(run, "write_history", 1),
    "before the model is moved": lambda: at_call(run, "save_picture", 1, after=True),
}


def child(recipe, moment=None):
    """Train in a forked process; its exit status, negative where a signal ended it."""
    pid = os.fork()
    if pid == 0:
        status = 1
        try:
            with record_rows(Path(recipe.output_dir)), MOMENTS[moment]() if moment else mock.patch.dict({}, {}):
                run.train(recipe, show_progress=False)
                Path(recipe.output_dir, "random.json").write_text(json.dumps(torch.rand(3).tolist()))
            status = 0
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(status)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def record_rows(folder):
    """Append each step and the rows that it saw to `rows.jsonl`."""
    own = MoeLlavaTrainer.compute_loss

    def compute_loss(self, model, inputs, *args, **kwargs):
        with Path(f"{folder}.rows.jsonl").open("a") as file:
            file.write(json.dumps([self.state.global_step, inputs["row_ids"]]) + "\n")
        return own(self, model, inputs, *args, **kwargs)

    return mock.patch.object(MoeLlavaTrainer, "compute_loss", compute_loss)


def main(folder):
    torch.set_num_threads(1)
    tiny = write_tiny(folder / "tiny")
    assert child(tiny_recipe(tiny, "tune", folder / "dense", "optim.max_steps=1")) == 0
    options = {"start_from": str(folder / "dense"), "moe": {"config": {"num_experts": 4}}}
    statuses = {}

    def recipe(name):
        return tiny_recipe(tiny, "experts", folder / name, "saving.keep=1", **options)

    assert child(recipe("uninterrupted")) == 0
    for moment in MOMENTS:
        killed = child(recipe(moment), moment)
        left = [path.name for path in checkpoints.checkpoints(folder / moment)]
        statuses[moment] = {"killed": killed, "left": left, "resumed": child(recipe(moment))}
    (folder / "statuses.json").write_text(json.dumps(statuses, indent=1))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
