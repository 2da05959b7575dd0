import json
import math

import numpy as np
import pytest

from moellava.eval.predictions import Prediction
from moellava.eval.score_table import score_predictions
from moellava.eval.scorers import find_scorers
from moellava.eval.scores import summarize


def prediction(number, answer, truth, answer_type="closed", **more):
    return Prediction(
        id=str(number), answer=answer, truth=truth, answer_type=answer_type,
        answer_type_from="data", **more,
    )  # fmt: skip


ROWS = [
    prediction(0, "yes", "yes", images=("a",), groups={"modality": "CT"}, num_images_seen=1),
    prediction(1, "normal", "no", images=("a",), groups={"modality": "CT"}, num_images_seen=1),
    prediction(
        2, "left lung", "lung", "open", images=("b",), groups={"modality": "MR"}, is_cut=True
    ),
    prediction(3, "B", "lung", "choice", options=("heart", "lung"), images=("c",)),
    prediction(4, "", "lung", "open"),
    prediction(5, "yes", " ", "open"),
]


def test_scores_follow_the_contract_and_are_valid_json():
    summary = summarize(score_predictions(ROWS, find_scorers()))
    again = json.loads(json.dumps(summary, allow_nan=False))
    assert again == summary
    for scores in (summary, *summary["groups"]["modality"].values()):
        for scorer in scores["scorers"].values():
            assert scorer["version"]
            for metric in scorer["metrics"].values():
                assert metric.keys() == {"value", "low", "high", "n"}
                assert 0 <= metric["low"] <= metric["value"] <= metric["high"] <= 1
    assert summary["scorers"].keys() == {scorer.name for scorer in find_scorers()}


def test_values_are_means_over_the_rows_that_a_metric_applies_to():
    summary = summarize(score_predictions(ROWS, find_scorers(["strict", "llava_med", "mcq"])))
    scorers = summary["scorers"]
    assert scorers["llava_med"]["metrics"]["closed_accuracy"]["value"] == 1.0
    assert scorers["strict"]["metrics"]["closed_accuracy"]["value"] == 0.5
    recall = scorers["strict"]["metrics"]["open_recall"]
    assert recall == {"value": 0.5, "low": 0.0, "high": 1.0, "n": 2}
    assert scorers["mcq"]["metrics"]["choice_accuracy"]["n"] == 1
    assert "accuracy" not in scorers["llava_med"]["metrics"]
    groups = summary["groups"]["modality"]
    assert groups["CT"]["scorers"]["strict"]["metrics"]["accuracy"]["value"] == 0.5
    assert "closed_accuracy" not in groups["MR"]["scorers"]["strict"]["metrics"]


def test_what_was_left_out_or_cut_is_counted():
    summary = summarize(score_predictions(ROWS, find_scorers(["strict"])))
    assert summary["num_questions"] == 5
    assert summary["empty_truth"] == ["5"]
    assert summary["empty_answers"] == 1
    assert summary["cut_answers"] == 1
    assert (summary["num_images"], summary["num_images_seen"]) == (3, 2)
    assert summary["answer_types"]["closed"] == {"data": 2}
    assert summary["intervals"]["num_clusters"] == 4  # three images, and a row without


def test_a_prompt_that_uses_the_gold_type_is_marked():
    marked = score_predictions([prediction(0, "yes", "yes", prompt="medevalkit")], find_scorers())
    assert summarize(marked)["uses_gold_type"]
    assert not summarize(score_predictions(ROWS, find_scorers()))["uses_gold_type"]


def test_two_predictions_for_one_row_are_refused():
    with pytest.raises(ValueError, match=r"1 predictions have the id of another: 0"):
        score_predictions([ROWS[0], ROWS[0]], find_scorers())


@pytest.mark.parametrize(("rows", "why"), [([], ""), ([ROWS[5]], r" \(1 have an empty truth\)")])
def test_nothing_to_score_is_an_error(rows, why):
    with pytest.raises(ValueError, match=f"no prediction to score{why}"):
        score_predictions(rows, find_scorers())


def test_an_unknown_group_suggests_the_nearest():
    with pytest.raises(ValueError, match=r"Unknown group 'modalty'\. Did you mean 'modality'"):
        score_predictions(ROWS, find_scorers(), group_by=["modalty"])


def test_groups_asked_for_are_the_only_ones():
    rows = [prediction(0, "yes", "yes", groups={"modality": "CT", "organ": "lung"})]
    table = score_predictions(rows, find_scorers(), group_by=["organ"])
    assert summarize(table)["groups"].keys() == {"organ"}


def test_a_group_of_many_values_is_counted_and_not_scored():
    rows = [prediction(n, "yes", "yes", groups={"site": str(n), "kind": "a"}) for n in range(51)]
    summary = summarize(score_predictions(rows, find_scorers(["strict"])))
    assert summary["groups"].keys() == {"kind"}
    assert summary["groups_not_scored"] == {"site": 51}
    assert summarize(score_predictions(ROWS, find_scorers()))["groups_not_scored"] == {}


def test_a_column_that_comes_late_is_unknown_before():
    table = score_predictions(ROWS, find_scorers(["mcq"]))
    column = table.column("mcq", "choice_accuracy")
    assert [math.isnan(value) for value in column] == [True, True, True, False, True]
    assert np.nanmean(column) == 1.0
