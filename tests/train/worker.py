"""Trains tiny models in forked children: alone, two by two, killed in the middle and resumed.

python worker.py FOLDER [RUN ...]: writes FOLDER/<run>/ for each run, or for those named,
FOLDER/statuses.json and FOLDER/seconds.json. Started once by conftest.py: a fork has what takes
seconds to import, and its parent has no threads that a fork would lose.
"""

import gc
import json
import os
import shutil
import signal
import sys
import time
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from unittest import mock

import peft  # noqa: F401  what every child would import
import torch

from moellava.train import checkpoints, finish, train
from moellava.train.trainer import MoeLlavaTrainer
from tests.train.children import free_port, in_child
from tests.train.tiny import tiny_recipe, write_tiny

NUM_ROWS, NUM_STEPS = 8, 5  # two steps an epoch
SPOILT = "NaN on the second process"


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
    "before the first checkpoint": lambda: at_step(0),
    "in the first epoch": lambda: at_step(1),
    "at an epoch's end": lambda: at_step(2),
    "in the second epoch": lambda: at_step(3),
    "while a checkpoint is written": lambda: at_call(MoeLlavaTrainer, "_save_scaler", 2),
    "before a checkpoint is moved": lambda: at_call(checkpoints.os, "rename", 2),
    "after a checkpoint is moved": lambda: at_call(checkpoints.os, "rename", 2, after=True),
    "while an old checkpoint is deleted": half_deleted,
    "while the model is written": lambda: at_call(finish, "write_history", 1),
    "before the model is moved": lambda: at_call(finish, "save_picture", 1, after=True),
}


def spoil_second_process():
    """From step 3 on, what the second process computes is NaN; the first sees nothing wrong."""
    own = MoeLlavaTrainer.compute_loss

    def compute_loss(self, *args, **kwargs):
        if self.args.process_index == 1 and self.state.global_step == 2:
            self.loaded.model.lm_head.register_forward_hook(
                lambda module, given, output: output * float("nan")
            )
        return own(self, *args, **kwargs)

    return mock.patch.object(MoeLlavaTrainer, "compute_loss", compute_loss)


def record_rows(file):
    """Append each step and the rows that it saw."""
    own = MoeLlavaTrainer.compute_loss

    def compute_loss(self, model, inputs, *args, **kwargs):
        if model.training:
            with file.open("a") as lines:
                lines.write(
                    json.dumps([os.getpid(), self.state.global_step, inputs["row_ids"]]) + "\n"
                )
        return own(self, model, inputs, *args, **kwargs)

    return mock.patch.object(MoeLlavaTrainer, "compute_loss", compute_loss)


def launch(recipe, num_processes=1, moment=None):
    """Train in forked processes; as torchrun does, all end when one has ended badly.

    Exit status, -9 if killed.
    """
    port = free_port()
    children = []
    for rank in range(num_processes):
        pid = os.fork()
        if pid == 0:
            os._exit(child(recipe, rank, num_processes, port, moment))
        children.append(pid)
    status = 0
    while children:
        pid, raw = os.wait()
        children.remove(pid)
        if raw and not status:
            status = os.waitstatus_to_exitcode(raw)
            for other in children:
                os.kill(other, signal.SIGKILL)
    return status


def child(recipe, rank, num_processes, port, moment):
    out = Path(recipe.output_dir)
    with Path(f"{out}.{rank}.txt").open("a") as said:
        os.dup2(said.fileno(), 1)
        os.dup2(said.fileno(), 2)
    body = partial(train_child, recipe, rank, moment)
    return in_child(body, rank=rank, num_processes=num_processes, port=port)


def train_child(recipe, rank, moment):
    with ExitStack() as stack:
        stack.enter_context(record_rows(Path(f"{recipe.output_dir}.{rank}.rows")))
        # Half of a tiny run's time.
        stack.enter_context(mock.patch.object(finish, "save_picture"))
        # For power cuts; a kill loses nothing.
        stack.enter_context(mock.patch.object(checkpoints.os, "fsync"))
        if moment is not None:
            stack.enter_context((MOMENTS | {SPOILT: spoil_second_process})[moment]())
        train(recipe, show_progress=False)


ADAPTERS = {
    "rank": 2,
    "alpha": 4,
    "dropout": 0.2,
}  # dropout draws random numbers, which a resumed run has to draw too
ACCUMULATED = ("optim.per_device_batch_size=1", "data.num_workers=1")
TWO_ROWS = "optim.per_device_batch_size=2"


class Runs:
    def __init__(self, folder, chosen=()):
        self.folder, self.chosen, self.statuses, self.seconds = folder, chosen, {}, {}
        self.tiny = write_tiny(folder / "tiny", num_rows=NUM_ROWS)

    def __call__(self, name, stage="tune", *overrides, num_processes=1, killed=None, **more):
        """Train `name`; with `killed`, until that moment and, if a signal ended it, once more."""
        if self.chosen and name not in self.chosen:
            return
        began = time.perf_counter()
        if stage == "experts":
            more |= {
                "start_from": str(self.folder / "dense"),
                "moe": {"config": {"num_experts": 4}},
            }
        every = 1 if num_processes == 1 else 3  # steps between checkpoints; the last is always kept
        settings = (
            f"optim.max_steps={NUM_STEPS}",
            f"saving.every={every}",
            "saving.keep=1",
            *overrides,
        )
        recipe = tiny_recipe(self.tiny, stage, self.folder / name, *settings, **more)
        found = {}
        if killed is not None:
            found["killed"] = launch(recipe, num_processes, killed)
            found["left"] = [path.name for path in checkpoints.checkpoints(self.folder / name)]
        if found.get("killed", -9) == -9:
            found["ended"] = launch(recipe, num_processes)
        self.statuses[name] = found
        self.seconds[name] = time.perf_counter() - began


def main(folder, *chosen):
    torch.set_num_threads(1)
    gc.freeze()  # the children's collections need not look at, and so copy, all that is imported
    runs = Runs(folder, chosen)
    runs("dense", "tune", "optim.max_steps=1")
    # One process, killed at every moment.
    runs("alone", "experts")
    for moment in MOMENTS:
        runs(moment, "experts", killed=moment)
    # Adapters with dropout, a worker that opens images, four accumulated batches.
    runs("adapters", "tune", *ACCUMULATED, lora=ADAPTERS)
    for moment in ("at an epoch's end", "in the second epoch"):
        runs(f"adapters {moment}", "tune", *ACCUMULATED, lora=ADAPTERS, killed=moment)
    # Two processes.
    two = {"num_processes": 2}
    even = (
        "data.group_by_length=false",
        "moe.config.router_aux_loss_coef=0",
    )  # that loss is not linear in the rows
    held_out = f"data.evaluation={runs.tiny / 'rows.json'}"
    even += (
        held_out,
        "evaluation.num_rows=4",
        "evaluation.num_answers=2",
        "evaluation.max_new_tokens=3",
        "evaluation.scorers=[token_f1]",
    )
    runs("one", "experts", *even)
    for parallel in ("ddp", "fsdp2"):
        # As the packaged recipes have it: with checkpointed activations.
        checkpointed = "optim.activation_checkpointing=true"
        runs(parallel, "experts", *even, TWO_ROWS, checkpointed, f"parallel={parallel}", **two)
    runs("ddp killed", "tune", *ACCUMULATED, lora=ADAPTERS, killed="in the second epoch", **two)
    runs("ddp adapters", "tune", *ACCUMULATED, lora=ADAPTERS, **two)
    plain = {**ADAPTERS, "dropout": 0.0}
    runs("one with adapters", "tune", lora=plain)
    for killed in (None, "in the second epoch"):
        name = "fsdp2 killed" if killed else "fsdp2 adapters"
        runs(name, "tune", TWO_ROWS, "parallel=fsdp2", lora=plain, killed=killed, **two)
    finished = {**two, "killed": "while the model is written"}
    runs("fsdp2 killed at the end", "tune", TWO_ROWS, "parallel=fsdp2", lora=plain, **finished)
    runs(SPOILT, "tune", TWO_ROWS, "parallel=fsdp2", killed=SPOILT, **two)
    runs("one experts adapters", "experts", *even, lora=plain)
    runs(
        "fsdp2 experts adapters",
        "experts",
        *even,
        TWO_ROWS,
        "parallel=fsdp2",
        checkpointed,
        lora=plain,
        **two,
    )
    # Rows 0 and 4 have no image: one process of two has none at all in that step.
    alone = ("data.group_by_length=false", "optim.batch_size=2")
    runs("one without images", "align", *alone, TWO_ROWS)
    for parallel in ("ddp", "fsdp2"):
        one_row = ("optim.per_device_batch_size=1", f"parallel={parallel}")
        runs(f"{parallel} without images", "align", *alone, *one_row, **two)
    features = f"data.features={folder / 'features.safetensors'}"
    runs("one aligned", "align")
    runs("two with features", "align", features, TWO_ROWS, **two)
    (folder / "statuses.json").write_text(json.dumps(runs.statuses, indent=1))
    (folder / "seconds.json").write_text(json.dumps(runs.seconds, indent=1))


if __name__ == "__main__":
    main(Path(sys.argv[1]), *sys.argv[2:])
