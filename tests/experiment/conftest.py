from pathlib import Path

import pytest

from tests.processes import run_worker
from tests.train.tiny import write_tiny


@pytest.fixture(scope="session")
def tiny(tmp_path_factory):
    """Parts and rows of tests/train/tiny.py."""
    return write_tiny(tmp_path_factory.mktemp("tiny"), num_rows=8)


@pytest.fixture(scope="session")
def experiments(made_once):
    """The folder that tests/experiment/worker.py leaves."""
    worker = Path(__file__).with_name("worker.py")
    return made_once("experiments", lambda folder: run_worker(worker, folder))
