"""Which option an answer names."""

import pytest

from moellava.eval.scorers.choices import named_options, option_of_truth

OPTIONS = ("lung", "left lung", "heart")


@pytest.mark.parametrize(
    ("answer", "named"),
    [
        ("B", {1}),
        ("(c)", {2}),
        ("The answer is B.", {1}),
        ("It is the left lung.", {1}),
        ("Lung", {0}),
        ("A mass in the heart", {2}),
        ("A or B", {0, 1}),
        ("heart and lung", {0, 2}),
        ("<answer>C</answer> A", {2}),
        (r"A, no: \boxed{heart}", {2}),
        ("D", set()),
        ("kidney", set()),
        ("", set()),
    ],
)
def test_by_letter_or_text(answer, named):
    assert named_options(answer, OPTIONS) == named


@pytest.mark.parametrize(
    ("truth", "index"), [("left lung", 1), ("Heart.", 2), ("A", 0), ("(b)", 1), ("liver", None)]
)
def test_the_truth_is_an_option_or_its_letter(truth, index):
    assert option_of_truth(truth, OPTIONS) == index
