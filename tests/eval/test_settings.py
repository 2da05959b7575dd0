"""Settings are checked where they are made."""

import pytest

from moellava.eval.settings import EvaluationSettings


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"baselines": ["blnk"]}, "Did you mean 'blank'"),
        ({"scorers": ["strikt"]}, "Did you mean 'strict'"),
        ({"prompt": "shrt"}, "Did you mean 'short'"),
        ({"batch_size": 0}, "batch_size is 0; expected 1 or more"),
    ],
)
def test_wrong_settings_are_refused_where_they_are_made(wrong, message):
    with pytest.raises(ValueError, match=message):
        EvaluationSettings(**wrong)
