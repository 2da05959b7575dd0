"""What `train` does before a stage runs: its folder, the recipe that began it, a finished run."""

import multiprocessing
import os
import shutil

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


def test_a_folder_of_another_recipe_is_refused(chain, tiny):
    recipe = tiny_recipe(tiny, "tune", chain / "tune")
    with pytest.raises(ValueError, match=r"another recipe \(.*start_from.*another output_dir"):
        train(recipe, show_progress=False)


def test_a_recipe_without_a_folder_is_refused(tiny):
    recipe = tiny_recipe(tiny, "tune", "x", "output_dir=null")
    with pytest.raises(ValueError, match=r"no output_dir. Add output_dir=runs/NAME"):
        train(recipe, show_progress=False)


def test_only_the_settings_that_differ_are_printed(tiny, tmp_path):
    train(tiny_recipe(tiny, "tune", tmp_path / "out", "optim.max_steps=1"), show_progress=False)
    other = tiny_recipe(tiny, "tune", tmp_path / "out", "optim.max_steps=1", "optim.warmup=0.5")
    with pytest.raises(
        ValueError, match=r"another recipe \(optim.warmup: 0.03 then, 0.5 now\). Give the same"
    ):
        train(other, show_progress=False)


def test_a_checkpoint_without_the_optimizers_state_is_not_resumed(tiny, tmp_path):
    recipe = tiny_recipe(tiny, "tune", tmp_path / "out", "optim.max_steps=4")
    result = train(recipe, show_progress=False)
    shutil.rmtree(result.model_folder)
    (tmp_path / "out" / "checkpoint-4" / "optimizer.pt").unlink()
    with pytest.raises(FileNotFoundError, match=r"checkpoint-4 has no optimizer.pt.*Delete this"):
        train(recipe, show_progress=False)
    shutil.rmtree(tmp_path / "out" / "checkpoint-4")
    assert losses(train(recipe, show_progress=False)) == losses(result)


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
