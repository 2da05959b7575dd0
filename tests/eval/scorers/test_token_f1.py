"""`token_f1` against SQuAD's formula written out."""

import re

import pytest
from hypothesis import given, settings

from moellava.eval.scorers.token_f1 import token_f1
from tests.eval.scorers.pairs import TEXTS, TRUTHS


def squad_words(text):
    kept = "".join(c for c in text.lower() if c != "_" and re.match(r"[\w\s]", c))
    return [word for word in kept.split() if word not in ("a", "an", "the")]


def squad_f1(answer, truth):
    said, true = squad_words(answer), squad_words(truth)
    if not said or not true:
        return float(said == true)
    left, num_shared = list(true), 0
    for word in said:
        if word in left:
            left.remove(word)
            num_shared += 1
    if not num_shared:
        return 0.0
    precision, recall = num_shared / len(said), num_shared / len(true)
    return 2 * precision * recall / (precision + recall)


@settings(max_examples=400, deadline=None)
@given(answer=TEXTS, truth=TRUTHS)
def test_equals_squads_formula(answer, truth):
    f1 = squad_f1(answer, truth)
    expected = {"f1": f1, "open_f1": f1}
    assert token_f1(answer, truth, answer_type="open") == pytest.approx(expected)


def test_a_repeated_word_counts_once():
    assert token_f1("left left", "left lung", answer_type="open")["f1"] == pytest.approx(0.5)
