import pytest

from moellava.eval.scorers.words import answer_words, contains_phrase


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("The Left-Lung.", ("left", "lung")),
        ("A", ("a",)),
        ("a mass", ("mass",)),
        ("3.50 cm", ("35mm",)),
        ("3 cmH2O", ("3", "cmh", "2", "o")),
        ("1,000,000 cells", ("1000000", "cells")),
        ("50%", ("50", "%")),
        ("50 percent", ("50", "%")),
        ("Don’t", ("don't",)),
        ("右肺", ("右", "肺")),
        ("!?", ()),
    ],
)
def test_words_of_an_answer(text, words):
    assert answer_words(text) == words


def test_a_phrase_is_found_only_as_neighbours():
    words = ("upper", "left", "lung")
    assert contains_phrase(words, ("left", "lung"))
    assert not contains_phrase(words, ("upper", "lung"))
    assert not contains_phrase(words, ())
