"""`strict`: our own rule, in which only a clear answer is right."""

import re
from collections import Counter
from collections.abc import Sequence
from functools import lru_cache

from moellava.eval.scorers.choices import named_options, option_of_truth
from moellava.eval.scorers.registry import AnswerType, Metrics
from moellava.eval.scorers.words import answer_words, num_shared_words

_YES = frozenset({"yes", "yeah", "yep", "true"})
_NO = frozenset({"no", "nope", "false"})
_CHINESE = {
    "是": "yes",
    "是的": "yes",
    "有": "yes",
    "否": "no",
    "不是": "no",
    "没有": "no",
    "无": "no",
}
_WORD = re.compile(r"[^\W\d_]+(?:['’][^\W\d_]+)*")
_NEGATIONS = frozenset({"no", "not", "without", "never", "cannot", "neither", "nor", "absent"})
_NOT_NEGATING = re.compile(r"\b(?:no doubt|not only|no less than|no more than)\b")


def strict(
    answer: str, truth: str, *, answer_type: AnswerType, options: Sequence[str] = ()
) -> Metrics:
    """Word boundaries, both named means wrong, quantities and negation count.

    Formula. Closed with a truth of yes or no: the answer's verdict (`verdict`) must be the truth.
    Closed with options, and choice: the right option and no other is named (`named_options`).
    Closed with neither: the answer must be the truth's words and no others. Open: `open_exact` is
    1 if the words (`answer_words`: without articles, numbers and lengths in one form) are equal;
    precision, recall and F1 are of the multisets of words, and 0 if one side negates and the other
    does not. `accuracy` is whether the answer is right, over questions of every type.

    Source: ours. Known faults: synonyms are wrong; a hedge ("possibly") is not read; a negation of
    another part of the sentence counts as one of the whole.
    """
    if answer_type != "open":
        right = float(_is_right(answer, truth, options))
        return {f"{answer_type}_accuracy": right, "accuracy": right}
    said, true = answer_words(answer), answer_words(truth)
    exact = float(said == true)
    precision, recall, f1 = 0.0, 0.0, 0.0
    if _negates(answer) == _negates(truth):
        precision, recall, f1 = _overlap(said, true)
    return {
        "open_exact": exact,
        "open_precision": precision,
        "open_recall": recall,
        "open_f1": f1,
        "accuracy": exact,
    }


@lru_cache(maxsize=1 << 16)
def verdict(answer: str) -> str | None:
    """The word "yes" or "no" if the answer says one of them and not both, else None.

    A "no" that opens the answer, ends a clause or stands beside "or" is a verdict. One that
    belongs to a noun ("there is no fracture") counts only if there is no verdict besides: "yes,
    there is no doubt" is yes.
    """
    text = answer.strip().casefold()
    if text.strip("。. ") in _CHINESE:
        return _CHINESE[text.strip("。. ")]
    said, is_negated = set(), False
    words = list(_WORD.finditer(text))
    for index, match in enumerate(words):
        if match[0] in _YES:
            said.add("yes")
        elif match[0] in _NO:
            next_word = words[index + 1] if index + 1 < len(words) else None
            between = text[match.end() : next_word.start()].strip() if next_word else "."
            if index == 0 or between or (next_word and next_word[0] in ("or", "and")):
                said.add("no")
            else:
                is_negated = True
    if not said and is_negated and not _NOT_NEGATING.search(text):
        return "no"
    return said.pop() if len(said) == 1 else None


def _is_right(answer: str, truth: str, options: Sequence[str]) -> bool:
    true_verdict = verdict(truth) if len(answer_words(truth)) == 1 or truth in _CHINESE else None
    if true_verdict is not None and not _has_other_options(options):
        return verdict(answer) == true_verdict
    right = option_of_truth(truth, options)
    if right is not None:
        return named_options(answer, tuple(options)) == {right}
    return answer_words(answer) == answer_words(truth)


def _has_other_options(options: Sequence[str]) -> bool:
    return any(verdict(option) is None for option in options)


@lru_cache(maxsize=1 << 16)
def _negates(text: str) -> bool:
    plain = _NOT_NEGATING.sub(" ", text.casefold())
    return any(
        word[0] in _NEGATIONS or word[0].replace("’", "'").endswith("n't")
        for word in _WORD.finditer(plain)
    )


def _overlap(said: Sequence[str], true: Sequence[str]) -> tuple[float, float, float]:
    num_shared = num_shared_words(Counter(said), Counter(true))
    if not num_shared:
        return 0.0, 0.0, 0.0
    precision, recall = num_shared / len(said), num_shared / len(true)
    return precision, recall, 2 * precision * recall / (precision + recall)
