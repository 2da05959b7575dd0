"""A tiny experiment from end to end, killed by SIGKILL at several moments and started again."""

import json

import pytest
from huggingface_hub import ModelCard
from safetensors.torch import load_file

from moellava.eval.predictions import read_predictions
from tests.experiment.worker import MOMENTS

RUNS = ("dense/seed-0", "mixture/seed-0")
RESULTS = ("results.json", "results.md", "results.png")


def status_of(experiments, name):
    return json.loads((experiments / "statuses.json").read_text())[name]


def results_of(experiments, name):
    return json.loads((experiments / name / "results.json").read_text())


def answers_of(folder):
    return [(one.id, one.answer) for one in read_predictions(folder)]


@pytest.mark.slow
def test_every_run_ends(experiments):
    assert status_of(experiments, "alone") == [0], (experiments / "alone.txt").read_text()[-3000:]
    assert status_of(experiments, "more seeds") == [0]


@pytest.mark.slow
def test_a_killed_experiment_ends_with_the_same_files(experiments):
    assert status_of(experiments, "killed") == [*(-9 for _ in MOMENTS), 0]
    alone, killed = experiments / "one seed", experiments / "killed"
    files = [
        {path.relative_to(root) for path in root.rglob("*") if path.is_file()}
        for root in (alone, killed)
    ]
    assert files[0] == files[1]
    for name in RESULTS:
        assert (killed / name).read_bytes() == (alone / name).read_bytes(), name
    for run in RUNS:
        card = f"{run}/2-experts/model/README.md"
        assert (killed / card).read_bytes() == (alone / card).read_bytes()
        for file in ("predictions.jsonl", "baselines/blank.jsonl"):
            path = f"{run}/evaluation/{file}"
            assert answers_of(killed / path) == answers_of(alone / path)
    weights = [load_file(root / RUNS[1] / "2-experts/model/model.safetensors")
               for root in (alone, killed)]  # fmt: skip
    assert all((weights[0][name] == weights[1][name]).all() for name in weights[0])


@pytest.mark.slow
def test_what_is_finished_is_left_alone_when_seeds_are_added(experiments):
    alone, more = experiments / "one seed", experiments / "alone"
    for run in RUNS:
        for file in ("2-experts/model/model.safetensors", "evaluation/predictions.jsonl"):
            times = [(root / run / file).stat().st_mtime_ns for root in (alone, more)]
            assert times[0] == times[1], file
    results = results_of(experiments, "alone")
    assert results["seeds"] == [0, 1]
    entry = results["variants"]["dense"]["scorers"]["token_f1"]["metrics"]["f1"]
    before = results_of(experiments, "one seed")["variants"]["dense"]
    assert entry["by_seed"][0] == before["scorers"]["token_f1"]["metrics"]["f1"]["value"]
    assert len(entry["by_seed"]) == 2
    assert entry["value"] == pytest.approx(sum(entry["by_seed"]) / 2)


@pytest.mark.slow
def test_results_are_those_of_each_evaluation(experiments):
    results = results_of(experiments, "one seed")
    for variant, found in results["variants"].items():
        scores = json.loads(
            (experiments / "one seed" / variant / "seed-0/evaluation/scores.json").read_text()
        )
        for scorer, entry in scores["scorers"].items():
            for metric, one in entry["metrics"].items():
                ours = found["scorers"][scorer]["metrics"][metric]
                assert ours["value"] == pytest.approx(one["value"])
                assert ours["n"] == one["n"]
        adds = found["image_adds"]["blank"]["scorers"]["strict"]["metrics"]["accuracy"]
        theirs = scores["image_adds"]["blank"]["scorers"]["strict"]["metrics"]["accuracy"]
        assert adds["value"] == pytest.approx(theirs["value"])


@pytest.mark.slow
def test_the_scores_are_in_each_checkpoints_card(experiments):
    for run in RUNS:
        folder = experiments / "alone" / run
        card = ModelCard.load(folder / "2-experts" / "model" / "README.md")
        [found] = card.data.eval_results
        scores = json.loads((folder / "evaluation" / "scores.json").read_text())
        entry = scores["scorers"]["strict"]["metrics"]["accuracy"]
        assert found.metric_type == "accuracy"
        assert found.metric_value == pytest.approx(entry["value"], abs=1e-4)
        assert found.dataset_name == "rows.json"
        assert found.task_type == "visual-question-answering"
        assert f"{entry['n']} questions" in found.metric_name
        assert str(experiments) not in str(card)  # no path of this machine


@pytest.mark.slow
def test_the_table_and_the_picture_are_there(experiments):
    text = (experiments / "alone" / "results.md").read_text()
    assert "| strict.accuracy | mixture − dense |" in text
    assert "| strict.accuracy | most_frequent |" in text
    assert (experiments / "alone" / "results.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.slow
def test_the_path_of_med_moe_hands_its_router_to_the_experts(experiments):
    assert status_of(experiments, "med_moe") == [0], (experiments / "med_moe.txt").read_text()
    run = experiments / "med_moe" / "mixture" / "seed-0"
    router = load_file(run / "2-router" / "model" / "router.safetensors")
    weights = load_file(run / "3-experts" / "model" / "model.safetensors")
    gate = weights["model.language_model.layers.1.mlp.gate.weight"]
    assert (gate == router["weight"]).all()
    assert "differences" in results_of(experiments, "med_moe")
