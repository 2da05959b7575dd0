"""Folders of a run are whole or not there."""

import pytest

from moellava.train import train
from moellava.train.trainer import MoeLlavaTrainer
from tests.train.tiny import losses, tiny_recipe

pytestmark = pytest.mark.usefixtures("quick_runs")


def test_a_full_disk_stops_and_keeps_the_last_good_checkpoint(tiny, tmp_path, monkeypatch):
    """The system refuses to let a file grow beyond 100 kB, as it does when a disk is full."""
    import resource

    own, (soft, hard) = MoeLlavaTrainer._save_checkpoint, resource.getrlimit(resource.RLIMIT_FSIZE)

    def limited(self, *args):
        if self.state.global_step == 4:
            resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))
        try:
            return own(self, *args)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))

    monkeypatch.setattr(MoeLlavaTrainer, "_save_checkpoint", limited)
    recipe = tiny_recipe(tiny, "tune", tmp_path / "out", "optim.max_steps=5")
    with pytest.raises(
        OSError, match=r"checkpoint-4 could not be written: .*too large.* If"
    ) as caught:
        train(recipe, show_progress=False)
    assert "The last good checkpoint is checkpoint-2" in str(caught.value)
    assert [path.name for path in (tmp_path / "out").glob("checkpoint-*")] == ["checkpoint-2"]
    assert not list((tmp_path / "out" / ".unfinished").glob("*"))
    monkeypatch.undo()
    result = train(recipe, show_progress=False)  # room again: it goes on
    whole = train(
        tiny_recipe(tiny, "tune", tmp_path / "whole", "optim.max_steps=5"), show_progress=False
    )
    assert losses(result) == losses(whole)


def test_an_error_in_our_own_code_is_not_called_a_full_disk(tiny, tmp_path, monkeypatch):
    monkeypatch.setattr(MoeLlavaTrainer, "_save_scaler", lambda *args: {}["missing"])
    with pytest.raises(KeyError, match="missing"):
        train(tiny_recipe(tiny, "tune", tmp_path / "out", "optim.max_steps=2"), show_progress=False)
