"""Is a question open, closed or a choice? `decide_answer_type`: by the data, else by a rule."""

from collections.abc import Sequence

from moellava.eval.scorers.choices import option_of_truth
from moellava.eval.scorers.registry import AnswerType

BY_DATA = "data"
BY_OPTIONS = "options"
BY_YES_NO = "truth is yes or no"
BY_DEFAULT = "truth is neither yes nor no"

# What data sets write, in lower case.
_KINDS: dict[str, AnswerType] = {
    "open": "open",
    "closed": "closed",
    "close": "closed",
    "yes/no": "closed",
    "yes_no": "closed",
    "choice": "choice",
    "multiple choice": "choice",
    "multiple-choice": "choice",
    "mcq": "choice",
}


def decide_answer_type(
    given: str | None, truth: str, options: Sequence[str] = ()
) -> tuple[AnswerType, str]:
    """The type of a question, and how it was decided, which `predictions.jsonl` keeps.

    The data's own type counts if there is one (a word other than open, closed and choice, such as
    "number", is open). Else a question with options whose truth is one of them is a choice; else
    one whose truth is yes or no is closed, and any other open.
    """
    if given and given.strip():
        kind = _KINDS.get(given.strip().lower())
        return (kind, BY_DATA) if kind else ("open", f"{BY_DATA}: {given.strip()}")
    if options and option_of_truth(truth, options) is not None:
        return "choice", BY_OPTIONS
    if truth.strip().rstrip(".").lower() in ("yes", "no"):
        return "closed", BY_YES_NO
    return "open", BY_DEFAULT
