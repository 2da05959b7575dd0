import pytest

from tests.train.tiny import write_tiny


@pytest.fixture(scope="session")
def tiny(tmp_path_factory):
    """Parts and rows of tests/train/tiny.py."""
    return write_tiny(tmp_path_factory.mktemp("tiny"))
