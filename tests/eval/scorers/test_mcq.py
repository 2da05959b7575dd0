import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moellava.eval.scorers.mcq import mcq
from tests.eval.scorers.pairs import OPTIONS, TEXTS

SIDES = ("left lung", "right lung", "lung", "heart")


@pytest.mark.parametrize(
    ("answer", "right", "ambiguous"),
    [
        ("B", 1.0, 0.0),
        ("b", 1.0, 0.0),
        ("(B)", 1.0, 0.0),
        ("B. right lung", 1.0, 0.0),
        ("B: right lung", 1.0, 0.0),
        ("Option B", 1.0, 0.0),
        ("The answer is B", 1.0, 0.0),
        ("It is not A. The answer is B.", 1.0, 0.0),
        ("<answer>B</answer>", 1.0, 0.0),
        (r"\boxed{B}", 1.0, 0.0),
        ("Right lung.", 1.0, 0.0),
        ("I see the right lung here", 1.0, 0.0),
        ("A", 0.0, 0.0),
        ("B. left lung", 0.0, 1.0),
        ("A) or B)", 0.0, 1.0),
        ("A or B", 0.0, 1.0),
        ("right lung and heart", 0.0, 1.0),
        ("A large mass", 0.0, 0.0),
        ("kidney", 0.0, 0.0),
        ("", 0.0, 0.0),
        ("E", 0.0, 0.0),
    ],
)
def test_letters_and_texts(answer, right, ambiguous):
    for truth in ("right lung", "B"):
        scored = mcq(answer, truth, answer_type="choice", options=SIDES)
        assert scored["choice_accuracy"] == scored["accuracy"] == right
        assert scored["choice_ambiguous"] == ambiguous


@settings(max_examples=300, deadline=None)
@given(answer=TEXTS, options=OPTIONS)
def test_at_most_one_option_is_right_and_the_kinds_of_wrong_exclude_each_other(answer, options):
    scores = [mcq(answer, option, answer_type="choice", options=options) for option in options]
    assert sum(score["choice_accuracy"] for score in scores) <= 1
    for score in scores:
        assert (score["choice_ambiguous"], score["choice_none"]) != (1.0, 1.0)


@settings(max_examples=200, deadline=None)
@given(options=OPTIONS, data=st.data())
def test_every_option_is_right_for_itself(options, data):
    truth = data.draw(st.sampled_from(options))
    letter = "ABCDE"[options.index(truth)]
    for answer in (truth, f"{truth}.", letter, f"({letter})", f"{letter}. {truth}"):
        assert mcq(answer, truth, answer_type="choice", options=options)["accuracy"] == 1.0


def test_a_question_without_options_is_not_scored():
    assert mcq("B", "B", answer_type="choice", options=()) == {}
    assert mcq("yes", "yes", answer_type="closed", options=()) == {}
