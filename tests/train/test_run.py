"""What `train` does before a stage runs: its folder, the recipe that began it, a finished run."""

import pytest

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
