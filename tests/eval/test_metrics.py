"""The one rule for "the same answer"."""

import pytest

from moellava.eval.metrics import is_exact_answer


@pytest.mark.parametrize(
    ("answer", "truth", "same"),
    [
        ("Yes.", "yes", True),
        (" left lung \n", "Left Lung", True),
        ("normal", "no", False),
        ("yes, it is", "yes", False),
        ("", "no", False),
        ("STRASSE", "straße", True),
    ],
)
def test_case_and_a_final_period_do_not_count(answer, truth, same):
    assert is_exact_answer(answer, truth) is same
