"""Runs a tiny experiment in forked children: alone, killed at each moment, and with more seeds.

python worker.py FOLDER: writes FOLDER/<name>/ for each, and FOLDER/statuses.json. Started once by
conftest.py: a fork has what takes seconds to import.
"""

import gc
import json
import os
import shutil
import signal
import sys
import traceback
from contextlib import nullcontext
from pathlib import Path
from unittest import mock

import torch

from moellava.eval.answer_file import AnswerFile
from moellava.experiment import load_experiment, run_experiment
from moellava.experiment import run as experiment_run
from moellava.train import checkpoints, finish
from moellava.train.trainer import MoeLlavaTrainer
from tests.experiment.tiny import experiment_settings, med_moe
from tests.train.tiny import write_tiny


def die(*args, **kwargs):
    os.kill(os.getpid(), signal.SIGKILL)


def at_call(owner, name, number):
    """After the `number`-th call of a function."""
    own, calls = getattr(owner, name), []

    def function(*args, **kwargs):
        result = own(*args, **kwargs)
        calls.append(args)
        if len(calls) == number:
            die()
        return result

    return mock.patch.object(owner, name, function)


# One experiment is killed at all of them, one after the other.
MOMENTS = {
    # The fourth step is the last of the second training.
    "in a training": lambda: at_call(MoeLlavaTrainer, "training_step", 4),
    "in an evaluation": lambda: at_call(AnswerFile, "append", 8),
    "before the results": lambda: at_call(experiment_run, "write_card", 1),
}


def launch(tiny, out, *overrides, moment=None, **more):
    """Exit status of a child, -9 if it was killed."""
    pid = os.fork()
    if pid:
        return os.waitstatus_to_exitcode(os.wait()[1])
    with Path(f"{out}.txt").open("a") as said:
        os.dup2(said.fileno(), 1)
        os.dup2(said.fileno(), 2)
    status = 1
    try:
        with (
            mock.patch.object(finish, "save_picture"),  # half of a tiny run's time
            mock.patch.object(checkpoints.os, "fsync"),
            MOMENTS[moment]() if moment else nullcontext(),
        ):
            experiment = load_experiment(experiment_settings(tiny, out, **more), overrides)
            run_experiment(experiment, say=print)
        status = 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        os._exit(status)


def main(folder):
    torch.set_num_threads(1)
    gc.freeze()  # the children's collections need not look at, and so copy, all that is imported
    tiny = write_tiny(folder / "tiny", num_rows=8)
    statuses = {"alone": [launch(tiny, folder / "alone")]}
    statuses["killed"] = [launch(tiny, folder / "killed", moment=one) for one in (*MOMENTS, None)]
    shutil.copytree(folder / "alone", folder / "one seed")
    statuses["more seeds"] = [launch(tiny, folder / "alone", "seeds=[0,1]")]
    statuses["med_moe"] = [launch(tiny, folder / "med_moe", **med_moe(tiny))]
    (folder / "statuses.json").write_text(json.dumps(statuses))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
