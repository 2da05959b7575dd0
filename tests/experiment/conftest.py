import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.train.tiny import write_tiny

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="session")
def tiny(tmp_path_factory):
    """Parts and rows of tests/train/tiny.py."""
    return write_tiny(tmp_path_factory.mktemp("tiny"), num_rows=8)


@pytest.fixture(scope="session")
def experiments(tmp_path_factory):
    """The folder that tests/experiment/worker.py leaves."""
    folder = tmp_path_factory.mktemp("experiments")
    done = subprocess.run(
        [sys.executable, str(Path(__file__).with_name("worker.py")), str(folder)],
        capture_output=True,
        text=True,
        timeout=300,
        # Threads do not outlive a fork.
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return folder
