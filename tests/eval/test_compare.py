import math

import pytest

from moellava.eval.compare import compare
from moellava.eval.predictions import Prediction
from moellava.eval.scorers import find_scorers


def side(answers, **more):
    return [
        Prediction(
            id=str(number), images=(f"{number // 2}",), question=f"Q{number}", answer=answer,
            truth="yes", answer_type="closed", answer_type_from="data",
            groups={"modality": "CT" if number < 4 else "MR"}, **more,
        )
        for number, answer in enumerate(answers)
    ]  # fmt: skip


FIRST = side(["yes", "yes", "yes", "no", "yes", "no"])
SECOND = side(["no", "yes", "no", "no", "yes", "yes"])


def test_paired_difference_and_mcnemar_of_each_scorer_and_group():
    found = compare(FIRST, SECOND, find_scorers(["strict", "token_f1"]))
    accuracy = found["scorers"]["strict"]["metrics"]["accuracy"]
    assert accuracy["value"] == pytest.approx(1 / 6)
    assert (accuracy["only_first"], accuracy["only_second"]) == (2, 1)
    assert accuracy["mcnemar_p"] == pytest.approx(1.0)
    assert accuracy["low"] <= accuracy["value"] <= accuracy["high"]
    groups = found["groups"]["modality"]
    assert groups["CT"]["scorers"]["strict"]["metrics"]["accuracy"]["value"] == pytest.approx(0.5)
    assert groups["MR"]["scorers"]["strict"]["metrics"]["accuracy"]["value"] == pytest.approx(-0.5)


def test_answers_that_changed_between_right_and_wrong_are_listed():
    changed = compare(FIRST, SECOND, find_scorers(["strict"]))["changed"]["strict"]
    assert [(row["id"], row["better"]) for row in changed] == [
        ("0", "first"), ("2", "first"), ("5", "second"),
    ]  # fmt: skip
    assert changed[0] | {"better": ""} == {
        "id": "0", "question": "Q0", "truth": "yes", "first": "yes", "second": "no", "better": "",
    }  # fmt: skip


def test_the_order_of_the_rows_does_not_matter():
    rules = find_scorers(["strict", "med_moe"])
    assert compare(FIRST, SECOND[::-1], rules) == compare(FIRST, SECOND, rules)


def test_rows_of_one_side_only_are_counted():
    found = compare(FIRST[:5], SECOND[1:], find_scorers(["strict"]))
    assert (found["num_pairs"], found["only_first"], found["only_second"]) == (4, ["0"], ["5"])


def test_predictions_of_other_data_are_refused():
    other = [Prediction(id="x", answer="a", truth="a", answer_type="open", answer_type_from="data")]
    with pytest.raises(ValueError, match="share no row"):
        compare(FIRST, other, find_scorers(["strict"]))


def test_a_metric_that_is_not_right_or_wrong_has_no_mcnemar_test():
    open_first = [
        Prediction(id=str(n), answer=text, truth="left lung", answer_type="open",
                   answer_type_from="data")
        for n, text in enumerate(["left", "lung mass", "left lung"])
    ]  # fmt: skip
    found = compare(open_first, open_first[:], find_scorers(["strict"]))
    assert "mcnemar_p" not in found["scorers"]["strict"]["metrics"]["open_f1"]
    assert found["scorers"]["strict"]["metrics"]["accuracy"]["mcnemar_p"] == 1.0
    assert not math.isnan(found["scorers"]["strict"]["metrics"]["open_f1"]["value"])
