"""The bar of a run."""

import pytest

from moellava.train import train
from moellava.train.trainer import MoeLlavaTrainer
from tests.train.tiny import tiny_recipe


def test_an_error_begins_on_a_line_of_its_own(tiny, tmp_path, monkeypatch, capfd):
    def fail(*args, **kwargs):
        raise ValueError("in the middle")

    monkeypatch.setattr(MoeLlavaTrainer, "compute_loss", fail)
    with pytest.raises(ValueError, match="in the middle"):
        train(tiny_recipe(tiny, "tune", tmp_path / "out"))
    assert capfd.readouterr().err.endswith("\n")
