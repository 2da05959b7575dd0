import os
import subprocess
import sys
from pathlib import Path
from unittest import mock

import pytest

from tests.train.tiny import write_tiny

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="session")
def tiny(tmp_path_factory):
    """Parts and rows of tests/train/tiny.py."""
    return write_tiny(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="module")
def quick_runs():
    """Runs draw no picture and do not wait for the disk, which is most of a tiny run's time."""
    with (
        mock.patch("moellava.train.gradient_steps.save_picture"),
        mock.patch("moellava.train.checkpoints.os.fsync"),
    ):
        yield


@pytest.fixture(scope="session")
def runs(tmp_path_factory):
    """The folder that tests/train/worker.py leaves."""
    folder = tmp_path_factory.mktemp("runs")
    done = subprocess.run(
        [sys.executable, str(Path(__file__).with_name("worker.py")), str(folder)],
        capture_output=True, text=True, timeout=300,
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},  # threads do not outlive a fork
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-4000:]
    return folder
