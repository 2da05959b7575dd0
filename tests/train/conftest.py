from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from unittest import mock

import pytest

from moellava.train import train
from tests.processes import run_worker
from tests.train.tiny import parts_of, tiny_recipe, write_tiny


@pytest.fixture(scope="session")
def tiny(made_once):
    """Parts and rows of tests/train/tiny.py."""
    return made_once("train-tiny", write_tiny)


@contextmanager
def _quick() -> Iterator[None]:
    with (
        mock.patch("moellava.train.finish.save_picture"),
        mock.patch("moellava.train.checkpoints.os.fsync"),
    ):
        yield


@pytest.fixture(scope="module")
def quick_runs():
    """Runs draw no picture and do not wait for the disk, which is most of a tiny run's time."""
    with _quick():
        yield


@pytest.fixture(scope="session")
def dense(tiny, made_once):
    """A dense model, one step old, to start from."""

    def write(folder):
        with _quick():
            train(
                tiny_recipe(tiny, "tune", folder / "run", "optim.max_steps=1"), show_progress=False
            )

    return made_once("train-dense", write) / "run"


@pytest.fixture(scope="session")
def chain(tiny, made_once):
    """The three stages, a few steps each, every one from the folder of the one before."""
    return made_once("train-chain", lambda root: _train_chain(root, tiny))


def _train_chain(root: Path, tiny: Path) -> None:
    rows = str(tiny / "rows.json")
    more = {
        "data": {
            "train": rows,
            "images": str(tiny / "images"),
            "num_workers": 0,
            "evaluation": rows,
        },
        "evaluation": {
            "every": 2,
            "num_rows": 6,
            "num_answers": 2,
            "scorers": ["strict", "token_f1"],
        },
    }
    moe = {"config": {"num_experts": 4, "moe_layers": [1], "router_aux_loss_coef": 0.1}}
    starts = {
        "align": {"after": None, "model": parts_of(tiny), "start_from": None},
        "tune": {"start_from": str(root / "align")},
        "experts": {"start_from": str(root / "tune"), "moe": moe},
    }
    with _quick():
        for stage, start in starts.items():
            recipe = tiny_recipe(tiny, stage, root / stage, "optim.max_steps=4", **start, **more)
            train(recipe, show_progress=False)


@pytest.fixture(scope="session")
def runs(made_once):
    """The folder that tests/train/worker.py leaves."""
    worker = Path(__file__).with_name("worker.py")
    return made_once("train-runs", lambda folder: run_worker(worker, folder))
