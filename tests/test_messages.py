"""Error texts that several rooms share."""

import pytest

from moellava.messages import did_you_mean, first_names, unknown_name


def test_an_unknown_name_suggests_the_nearest_and_lists_all():
    error = unknown_name("colour", "gren", {"red", "green", "blue"})
    assert str(error) == "Unknown colour 'gren'. Did you mean 'green'? Known: blue, green, red."


def test_nothing_is_suggested_where_nothing_is_near():
    assert did_you_mean("zebra", ["red", "green"]) == ""


@pytest.mark.parametrize(
    ("names", "text"),
    [([], ""), (["a", "b"], "a, b"), (list("abcdefg"), "a, b, c, d, e and 2 more")],
)
def test_many_names_are_shortened_and_counted(names, text):
    assert first_names(names) == text
