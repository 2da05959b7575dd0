"""`mcq`: multiple choice by letter or by the text of an option."""

from collections.abc import Sequence

from moellava.eval.scorers.choices import named_options, option_of_truth
from moellava.eval.scorers.registry import AnswerType, Metrics


def mcq(
    answer: str, truth: str, *, answer_type: AnswerType, options: Sequence[str] = ()
) -> Metrics:
    """Right if the answer names the right option and no other; of questions with options only.

    Formula: the options that the answer names are found by letter ("B", "(b)", "B. lung", "option
    B") and by text (whole words, the longest option first), see `named_options`. `choice_accuracy`
    is 1 if only the right one is named. `choice_ambiguous` is 1 if several are, `choice_none` if
    none is; both are wrong. A question without options is not scored, whatever its type.

    Source: ours. Known faults: negation is not read ("not A" names A); a synonym of an option names
    nothing.
    """
    right = option_of_truth(truth, options) if options else None
    if right is None:
        return {}
    named = named_options(answer, tuple(options))
    is_right = float(named == {right})
    return {
        "choice_accuracy": is_right,
        "choice_ambiguous": float(len(named) > 1),
        "choice_none": float(not named),
        "accuracy": is_right,
    }
