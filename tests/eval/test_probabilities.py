import numpy as np
import pytest
from sklearn.metrics import roc_auc_score

from moellava.eval import probabilities
from moellava.eval.predictions import Prediction
from moellava.eval.statistics import Resamples


def probability_scores(predictions, group_by=()):
    """Each prediction about an image of its own."""
    numbers = {one.id: number for number, one in enumerate(predictions)}
    resamples = Resamples(np.arange(len(predictions)), num_resamples=50)
    return probabilities.probability_scores(predictions, numbers, resamples, group_by)


def closed(number, yes, truth, modality="CT"):
    return Prediction(
        id=str(number), answer="", truth=truth, answer_type="closed", answer_type_from="data",
        probabilities={"yes": yes, "no": 1 - yes}, groups={"modality": modality},
    )  # fmt: skip


def test_auroc_accuracy_and_calibration_of_yes_and_no():
    shares, truths = [0.9, 0.8, 0.3, 0.2, 0.6], ["yes", "no", "yes", "no", "yes"]
    rows = [closed(n, *pair) for n, pair in enumerate(zip(shares, truths, strict=True))]
    found = probability_scores(rows)["all"]
    area, accuracy = found["auroc"], found["accuracy"]
    assert area["value"] == pytest.approx(roc_auc_score([t == "yes" for t in truths], shares))
    assert accuracy["value"] == pytest.approx(3 / 5)
    for interval in (area, accuracy):
        assert 0 <= interval["low"] <= interval["value"] <= interval["high"] <= 1
        assert interval["n"] == 5
    assert sum(entry["count"] for entry in found["bins"]) == found["n"] == 5
    assert found["num_bins"] == 15


def test_groups_and_a_group_of_one_truth():
    rows = [closed(0, 0.9, "yes"), closed(1, 0.4, "no"), closed(2, 0.7, "yes", "MR")]
    groups = probability_scores(rows, ["modality"])["groups"]["modality"]
    assert groups["CT"]["auroc"]["value"] == 1.0
    assert groups["MR"]["auroc"] is None
    assert groups["MR"]["n"] == 1


def test_stated_options_by_letter_or_text():
    def choice(number, truth, shares):
        return Prediction(
            id=str(number), answer="", truth=truth, answer_type="choice",
            answer_type_from="options", options=("lung", "heart"), probabilities=shares,
        )  # fmt: skip

    rows = [
        choice(0, "B", {"A": 0.2, "B": 0.8}),
        choice(1, "lung", {"lung": 0.4, "heart": 0.6}),
    ]
    found = probability_scores(rows)["all"]
    assert found["accuracy"]["value"] == 0.5
    assert found["auroc"] is None


def test_rows_without_probabilities_or_with_another_truth_do_not_count():
    row = closed(0, 0.9, "left")
    assert probability_scores([row]) is None
    plain = Prediction(
        id="1", answer="", truth="yes", answer_type="closed", answer_type_from="data"
    )
    assert probability_scores([plain]) is None


def test_options_named_yes_and_no_are_yes_and_no():
    rows = [
        Prediction(
            id=str(number), answer="", truth=truth, answer_type="choice", options=("No", "Yes"),
            answer_type_from="options", probabilities={"No": 1 - yes, "Yes": yes},
        )
        for number, (yes, truth) in enumerate([(0.9, "Yes"), (0.2, "No"), (0.3, "Yes")])
    ]  # fmt: skip
    assert probability_scores(rows)["all"]["auroc"]["value"] == 1.0


def test_a_prediction_that_is_not_scored_does_not_count():
    rows = [closed(0, 0.9, "yes"), closed(1, 0.1, "no")]
    resamples = Resamples(np.arange(1), num_resamples=5)
    found = probabilities.probability_scores(rows, {"0": 0}, resamples)
    assert found["all"]["n"] == 1
