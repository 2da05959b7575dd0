"""`token_f1`: the F1 of words that MedGemma's tables have for VQA-RAD and SLAKE."""

import re
from collections import Counter
from collections.abc import Sequence
from functools import lru_cache

from moellava.eval.scorers.registry import AnswerType, Metrics
from moellava.eval.scorers.words import num_shared_words

_NOT_A_WORD = re.compile(r"[^\w\s]|_")
_ARTICLES = frozenset({"a", "an", "the"})


def token_f1(
    answer: str, truth: str, *, answer_type: AnswerType, options: Sequence[str] = ()
) -> Metrics:
    """Token F1 in the manner of SQuAD, over questions of every type.

    Formula: lower-case, delete punctuation and the articles a, an, the, split at white space; F1 of
    the two multisets of words. Both empty is 1, one empty 0.

    Source: MedGemma (arXiv 2507.05201) reports "tokenized F1" and does not print its formula; this
    is the one of SQuAD v1.1, which others use to reproduce it.

    Known faults: word order and negation do not count ("no fracture" has F1 0.67 with "fracture");
    a long right answer to a yes/no question scores low.
    """
    f1 = _f1(_words(answer), _words(truth))
    return {"f1": f1, f"{answer_type}_f1": f1}


@lru_cache(maxsize=1 << 16)
def _words(text: str) -> Counter[str]:
    return Counter(w for w in _NOT_A_WORD.sub("", text.lower()).split() if w not in _ARTICLES)


def _f1(said: Counter[str], true: Counter[str]) -> float:
    if not said or not true:
        return float(said == true)
    num_shared = num_shared_words(said, true)
    return 2 * num_shared / (said.total() + true.total())
