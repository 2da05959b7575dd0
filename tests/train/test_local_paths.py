"""No file that a run's checkpoints, adapters and models hold names a path of this machine.

`recipe.yaml`, which is the user's own settings, and what reporters write do.
"""

from pathlib import Path

import pytest

from moellava.train import train
from tests.train.tiny import tiny_recipe

pytestmark = pytest.mark.usefixtures("quick_runs")


def files_with_paths(run: Path, *places: Path) -> list[str]:
    roots = [str(place).encode() for place in (run.parent, *places)]
    return [
        str(path.relative_to(run))
        for path in sorted(run.rglob("*"))
        if path.is_file() and any(root in path.read_bytes() for root in roots)
    ]


@pytest.mark.parametrize("lora", [None, {"rank": 2, "alpha": 4}], ids=["whole", "adapters"])
@pytest.mark.parametrize("stage", ["tune", "experts"])
def test_no_file_of_a_stage_holds_a_path_but_the_recipe(tiny, dense, tmp_path, lora, stage):
    settings = ("optim.max_steps=2", "saving.every=1", "after=any")
    more = {"start_from": str(dense), "lora": lora}
    if stage == "experts":
        more["moe"] = {"config": {"num_experts": 4}}
    train(tiny_recipe(tiny, stage, tmp_path / "run", *settings, **more), show_progress=False)
    run = tmp_path / "run"
    assert {path.name for path in run.iterdir()} >= {"checkpoint-2", "model", "recipe.yaml"}
    assert (run / "adapter").is_dir() == (lora is not None)
    assert files_with_paths(run, tiny, dense) == ["recipe.yaml"]


def test_nor_does_the_router_stage(tiny, dense, tmp_path):
    more = {"start_from": str(dense), "moe": {"config": {"num_experts": 4}}}
    recipe = tiny_recipe(tiny, "router", tmp_path / "run", "optim.max_steps=null", **more)
    train(recipe, show_progress=False)
    assert files_with_paths(tmp_path / "run", tiny, dense) == ["recipe.yaml"]
