"""Predictions in files become means, paired differences and what the image adds."""

from types import SimpleNamespace

import numpy as np
import pytest

from moellava.eval.predictions import Prediction
from moellava.experiment import load_experiment
from moellava.experiment.check import Checked
from moellava.experiment.results import summarize_runs
from moellava.experiment.table import results_table
from tests.experiment.tiny import experiment_settings

IMAGES, QUESTIONS = 10, 3


def write(path, right):
    """Answers to closed questions, right where the array says so."""
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = [
        Prediction(
            id=f"{image}-{number}", images=(f"{image}.png",), truth="yes", answer_type="closed",
            answer_type_from="data", answer="yes" if right[image, number] else "no",
        ).as_line()
        for image in range(IMAGES)
        for number in range(QUESTIONS)
    ]  # fmt: skip
    path.write_text("".join(f"{line}\n" for line in lines))


@pytest.fixture(scope="module")
def found(tiny, tmp_path_factory):
    """Results of known answers, and the answers as (S, images, questions) arrays."""
    folder = tmp_path_factory.mktemp("answers")
    settings = experiment_settings(tiny, folder, seeds=[0, 1, 2])
    settings["evaluation"] |= {"scorers": ["strict"], "baselines": ["blank"]}
    rng = np.random.default_rng(0)
    shares = {"dense": 0.5, "mixture": 0.8}
    answers, runs = {}, []
    for variant, share in shares.items():
        for name in (variant, f"{variant} blank"):
            answers[name] = rng.random((3, IMAGES, QUESTIONS)) < (share if name in shares else 0.3)
        for seed in range(3):
            run = SimpleNamespace(
                variant=variant, seed=seed, evaluation_folder=folder / variant / str(seed)
            )
            write(run.evaluation_folder / "predictions.jsonl", answers[variant][seed])
            blank = run.evaluation_folder / "baselines" / "blank.jsonl"
            write(blank, answers[f"{variant} blank"][seed])
            runs.append(run)
    checked = Checked(stages={"dense": {}, "mixture": {}}, num_questions=30, num_images=10)
    return summarize_runs(load_experiment(settings), runs, checked), answers


def accuracy(scorers):
    return scorers["strict"]["metrics"]["accuracy"]


def test_values_are_means_over_seeds_and_questions(found):
    results, answers = found
    for variant in ("dense", "mixture"):
        entry = accuracy(results["variants"][variant]["scorers"])
        assert entry["value"] == pytest.approx(answers[variant].mean())
        assert entry["by_seed"] == pytest.approx(answers[variant].mean((1, 2)))
        assert entry["n"] == 30
        assert entry["low"] < entry["value"] < entry["high"]


def test_differences_are_paired(found):
    results, answers = found
    [pair] = results["differences"]
    assert (pair["first"], pair["second"]) == ("mixture", "dense")
    entry = accuracy(pair["scorers"])
    by_seed = (answers["mixture"] * 1.0 - answers["dense"]).mean((1, 2))
    assert entry["by_seed"] == pytest.approx(by_seed)
    assert entry["value"] == pytest.approx(by_seed.mean())
    assert entry["t_low"] < entry["value"] < entry["t_high"]
    adds = accuracy(results["variants"]["dense"]["image_adds"]["blank"]["scorers"])
    blank = answers["dense blank"]
    assert adds["value"] == pytest.approx((answers["dense"] * 1.0 - blank).mean())


def test_the_same_answers_differ_by_nothing_whatever_their_spread(found, tiny, tmp_path):
    settings = experiment_settings(tiny, tmp_path, seeds=[0, 1])
    settings["evaluation"] |= {"scorers": ["strict"], "baselines": []}
    answers = np.random.default_rng(1).random((2, IMAGES, QUESTIONS)) < 0.5
    runs = []
    for variant in ("dense", "mixture"):
        for seed in range(2):
            folder = tmp_path / variant / str(seed)
            write(folder / "predictions.jsonl", answers[seed])
            runs.append(SimpleNamespace(variant=variant, seed=seed, evaluation_folder=folder))
    checked = Checked(stages={"dense": {}, "mixture": {}})
    results = summarize_runs(load_experiment(settings), runs, checked)
    entry = accuracy(results["differences"][0]["scorers"])
    assert (entry["low"], entry["value"], entry["high"]) == (0, 0, 0)
    assert "p_value" not in entry  # the seeds' differences do not vary


def test_the_table_says_what_was_found(found):
    results, answers = found
    text = results_table(results)
    assert f"| {100 * answers['dense'].mean():.1f} (" in text
    difference = 100 * (answers["mixture"].mean() - answers["dense"].mean())
    assert f"| mixture − dense | {difference:+.1f} " in text
    assert "crossed" in text
