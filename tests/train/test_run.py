"""What `train` does before a stage runs: its folder, the recipe that began it, a finished run."""

import multiprocessing
import os

import pytest

from moellava.storage.locking import locked
from moellava.train import train
from tests.train.tiny import losses, tiny_recipe

pytestmark = pytest.mark.usefixtures("quick_runs")


def test_a_finished_run_is_not_trained_again(tiny, tmp_path):
    recipe = tiny_recipe(tiny, "tune", tmp_path / "out", "optim.max_steps=2")
    first = train(recipe, show_progress=False)
    written = (first.model_folder / "model.safetensors").stat().st_mtime_ns
    again = train(recipe, show_progress=False)
    assert (first.was_finished, again.was_finished) == (False, True)
    assert losses(again) == losses(first)
    assert (again.model_folder / "model.safetensors").stat().st_mtime_ns == written


def hold(folder, held, ended):
    with locked(folder):
        held.set()
        ended.wait(60)


def test_two_processes_in_one_folder(tiny, tmp_path):
    """The second is told who is first; a killed one's lock is taken over."""
    (tmp_path / "out").mkdir()
    context = multiprocessing.get_context("spawn")
    held, ended = context.Event(), context.Event()
    first = context.Process(target=hold, args=(tmp_path / "out", held, ended))
    first.start()
    assert held.wait(60)
    recipe = tiny_recipe(tiny, "tune", tmp_path / "out", "optim.max_steps=1")
    with pytest.raises(OSError, match=rf"in use by another process \(pid {first.pid} on "):
        train(recipe, show_progress=False)
    first.kill()
    first.join()
    assert not train(recipe, show_progress=False).was_finished


def test_a_worker_of_a_killed_run_does_not_keep_its_lock(tmp_path):
    with locked(tmp_path):
        reader, writer = os.pipe()
        child = os.fork()
        if child == 0:  # as a data loader's worker, which ends some seconds after its parent
            os.close(writer)
            os.read(reader, 1)
            os._exit(0)
        os.close(reader)
    try:
        with locked(tmp_path):
            pass
    finally:
        os.close(writer)
        os.waitpid(child, 0)
