"""A stage that trains by gradient steps resumes only from what is whole."""

import shutil

import pytest

from moellava.train import train
from tests.train.tiny import losses, tiny_recipe

pytestmark = pytest.mark.usefixtures("quick_runs")


def test_a_checkpoint_without_the_optimizers_state_is_not_resumed(tiny, tmp_path):
    recipe = tiny_recipe(tiny, "tune", tmp_path / "out", "optim.max_steps=4")
    result = train(recipe, show_progress=False)
    shutil.rmtree(result.model_folder)
    (tmp_path / "out" / "checkpoint-4" / "optimizer.pt").unlink()
    with pytest.raises(FileNotFoundError, match=r"checkpoint-4 has no optimizer.pt.*Delete this"):
        train(recipe, show_progress=False)
    shutil.rmtree(tmp_path / "out" / "checkpoint-4")
    assert losses(train(recipe, show_progress=False)) == losses(result)
