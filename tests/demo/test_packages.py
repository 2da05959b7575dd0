"""What the demo needs is asked for first."""

import importlib.util

import pytest

from moellava.demo.run import (
    run_demo,
)


def test_a_missing_package_is_named_before_the_training(tmp_path, monkeypatch):
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name == "nilearn" else find_spec(name)
    )
    with pytest.raises(ImportError, match=r'needs nilearn. Type: pip install "moellava\[demo\]"'):
        run_demo(tmp_path, num_steps=1, seed=0)
