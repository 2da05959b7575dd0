import pytest

from moellava.eval.answer_types import decide_answer_type


@pytest.mark.parametrize(
    ("given", "truth", "options", "expected"),
    [
        ("CLOSED", "left", (), ("closed", "data")),
        ("OPEN", "yes", (), ("open", "data")),
        ("close", "yes", (), ("closed", "data")),
        ("yes/no", "yes", (), ("closed", "data")),
        ("number", "3", (), ("open", "data: number")),
        (None, "B", ("lung", "heart"), ("choice", "options")),
        (None, "heart", ("lung", "heart"), ("choice", "options")),
        (None, "lung, heart", ("lung", "heart"), ("open", "truth is neither yes nor no")),
        (None, "Yes.", (), ("closed", "truth is yes or no")),
        ("", "no", (), ("closed", "truth is yes or no")),
        (None, "normal", (), ("open", "truth is neither yes nor no")),
    ],
)
def test_the_data_decides_then_options_then_the_truth(given, truth, options, expected):
    assert decide_answer_type(given, truth, options) == expected
