"""A run resumes only with the recipe that began it."""

import pytest

from moellava.train import train
from tests.train.tiny import tiny_recipe

pytestmark = pytest.mark.usefixtures("quick_runs")


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
