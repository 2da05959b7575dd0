"""The experiment of docs/experiments.md runs as it stands there, at a tiny size."""

import re
from pathlib import Path
from unittest import mock

import pytest
import yaml

from moellava.experiment import load_experiment, run_experiment
from moellava.experiment.options import EvaluationOptions, Experiment
from moellava.settings import known_keys

DOCS = Path(__file__).parents[2] / "docs"
SMALL = {
    "num_train_crops=96, num_held_out_crops=24": "num_train_crops=4, num_held_out_crops=1",
    'toy / "parts", files': 'toy / "parts", files, tower_steps=1, text_steps=1',
}


@pytest.mark.slow
def test_the_first_use_runs(tmp_path, monkeypatch, no_network):
    monkeypatch.chdir(tmp_path)
    [snippet] = re.findall(
        r"```python\n(.*?)```", (DOCS / "experiments.md").read_text(encoding="utf-8"), re.DOTALL
    )
    for theirs, ours in SMALL.items():
        assert theirs in snippet
        snippet = snippet.replace(theirs, ours)
    one_step = [f"variants.{name}.optim.max_steps=1" for name in ("dense", "mixture")]
    with mock.patch("moellava.train.finish.save_picture"):
        exec(snippet, {})
        sizes = ["num_resamples=10", "scorers=[strict]", "limit=8"]
        small = ["seeds=[0]", *(f"evaluation.{size}" for size in sizes)]
        experiment = load_experiment(DOCS / "mixture_or_dense.yaml", [*small, *one_step])
        results = run_experiment(experiment)
    facts = {name: one["model"]["experts"] for name, one in results["variants"].items()}
    dense, mixture = facts["dense"], facts["mixture"]
    assert (dense["num_rows"], dense["num_steps"]) == (mixture["num_rows"], mixture["num_steps"])
    routers = 4 * 8 * 128  # layers, experts, width
    assert mixture["num_active"] == dense["num_active"] + routers
    assert mixture["num_parameters"] > 2 * dense["num_parameters"]


def test_the_first_use_has_five_seeds_and_equal_stages_but_for_the_mixture():
    settings = yaml.safe_load((DOCS / "mixture_or_dense.yaml").read_text(encoding="utf-8"))
    assert len(settings["seeds"]) >= 5
    assert settings["variants"]["dense"] == {"moe": False}
    assert list(settings["variants"]["mixture"]) == ["moe"]


def test_the_guide_names_every_key():
    text = (DOCS / "experiments.md").read_text(encoding="utf-8")
    for cls in (Experiment, EvaluationOptions):
        for key in known_keys(cls):
            assert f"`{key.rpartition('.')[2]}`" in text, key
