import pytest
from hypothesis import given, settings

from moellava.eval.scorers.strict import strict, verdict
from moellava.eval.scorers.words import answer_words
from tests.eval.scorers.pairs import TEXTS, TRUTHS


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        ("Yes", "yes"),
        ("yes.", "yes"),
        ("Yes, there is no doubt", "yes"),
        ("No", "no"),
        ("No acute fracture", "no"),
        ("The answer is no.", "no"),
        ("There is no fracture", "no"),
        ("no, it is not", "no"),
        ("normal", None),
        ("unknown", None),
        ("the diagnosis", None),
        ("not sure", None),
        ("there is no doubt", None),
        ("yes and no", None),
        ("yes or no", None),
        ("no or yes", None),
        ("yes. No.", None),
        ("", None),
        ("是的", "yes"),
        ("没有。", "no"),
    ],
)
def test_the_verdict_of_an_answer(answer, expected):
    assert verdict(answer) == expected


@settings(max_examples=300, deadline=None)
@given(answer=TEXTS)
def test_at_most_one_of_yes_and_no_is_right(answer):
    right = [
        strict(answer, truth, answer_type="closed")["closed_accuracy"] for truth in ("yes", "no")
    ]
    assert sum(right) <= 1


@pytest.mark.parametrize(
    ("answer", "truth", "options", "right"),
    [
        ("the left one", "left", ("left", "right"), 1.0),
        ("left or right", "left", ("left", "right"), 0.0),
        ("B", "right", ("left", "right"), 1.0),
        ("left", "left", (), 1.0),
        ("left and right", "left", (), 0.0),
        ("the left", "Left.", (), 1.0),
        ("yes, it is", "yes", ("yes", "no"), 1.0),
    ],
)
def test_closed_answers(answer, truth, options, right):
    scored = strict(answer, truth, answer_type="closed", options=options)
    assert scored == {"closed_accuracy": right, "accuracy": right}


def plain_overlap(said, true):
    left, num_shared = list(true), 0
    for word in said:
        if word in left:
            left.remove(word)
            num_shared += 1
    if not num_shared:
        return 0.0, 0.0, 0.0
    precision, recall = num_shared / len(said), num_shared / len(true)
    return precision, recall, 2 * precision * recall / (precision + recall)


@settings(max_examples=300, deadline=None)
@given(answer=TEXTS, truth=TRUTHS)
def test_open_precision_recall_and_f1_are_of_multisets(answer, truth):
    scored = strict(answer, truth, answer_type="open")
    overlap = plain_overlap(answer_words(answer), answer_words(truth))
    negation = (0.0, 0.0, 0.0)
    found = (scored["open_precision"], scored["open_recall"], scored["open_f1"])
    assert found == pytest.approx(overlap) or found == negation
    assert scored["open_exact"] == float(answer_words(answer) == answer_words(truth))


@settings(max_examples=300, deadline=None)
@given(text=TRUTHS)
def test_the_truth_itself_is_right(text):
    scored = strict(text, text, answer_type="open")
    assert scored["open_exact"] == 1.0
    assert scored["open_f1"] == (1.0 if answer_words(text) else 0.0)


@pytest.mark.parametrize(
    ("answer", "truth", "f1"),
    [
        ("no fracture", "fracture", 0.0),
        ("it isn't a fracture", "fracture", 0.0),
        ("fracture, no doubt", "fracture", 0.5),
        ("no fracture", "no fracture", 1.0),
        ("5cm", "50 mm", 1.0),
        ("5 cm", "5 mm", 0.0),
        ("two", "2", 1.0),
        ("3,000", "3000", 1.0),
        ("X-ray", "xray", 1.0),
        ("left left", "left lung", 0.5),
    ],
)
def test_negation_quantities_and_spelling(answer, truth, f1):
    assert strict(answer, truth, answer_type="open")["open_f1"] == pytest.approx(f1)
