from collections import Counter

import pytest

from moellava.data import Row, Turn
from moellava.eval.baselines import BLANK, blank, most_frequent, no_image, other_image
from moellava.eval.predictions import Prediction
from moellava.eval.questions import questions_of


@pytest.fixture
def question():
    turns = (
        Turn("system", "Be brief."), Turn("user", "<image>\nCT <image>?"), Turn("assistant", "yes"),
    )  # fmt: skip
    [found] = questions_of([Row(id="1", images=("a", "b"), turns=turns)])
    return found


def test_blank_keeps_every_place_of_an_image(question):
    assert blank(question, ["a", "b"]) == (question.turns, (BLANK, BLANK))


def test_no_image_leaves_the_words(question):
    turns, images = no_image(question, ["a", "b"])
    assert images == ()
    assert [turn.text for turn in turns] == ["Be brief.", "CT ?"]


@pytest.mark.parametrize("num_images", [2, 3, 7, 10])
def test_every_image_becomes_another_and_each_is_used_once(num_images):
    names = [f"{number}" for number in range(num_images)]
    others = []
    for name in names:
        row = Row(id=name, images=(name,), turns=(Turn("user", "<image>"), Turn("assistant", "x")))
        [question] = questions_of([row])
        _, [other] = other_image(question, names)
        assert other != name
        others.append(other)
    assert set(Counter(others).values()) == {1}


def test_a_single_image_has_no_other(question):
    assert other_image(question, ["a"]) is None


def prediction(question, answer_type="closed"):
    return Prediction(
        id=question, question=question, answer="?", truth="t", answer_type=answer_type,
        answer_type_from="data", num_tokens=3, is_cut=True,
    )  # fmt: skip


def test_the_most_frequent_answer_is_that_of_its_kind():
    known = [
        ("closed", "Is it CT?", "yes"), ("closed", "Is it MR?", "yes"),
        ("closed", "Is it US?", "no"),
        ("closed", "Are they two?", "no"), ("open", "What is it?", "lung"),
    ]  # fmt: skip
    asked = [
        prediction("Is this it?"), prediction("Are we there?"), prediction("Can it?"),
        prediction("Where?", "open"), prediction("Which?", "choice"),
    ]  # fmt: skip
    found = list(most_frequent(asked, known))
    assert [one.answer for one in found] == ["yes", "no", "no", "lung", "no"]
    assert {(one.num_tokens, one.is_cut) for one in found} == {(None, None)}
