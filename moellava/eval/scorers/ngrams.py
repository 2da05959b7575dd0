"""BLEU and ROUGE of one answer, from nltk and rouge-score: `bleu`, `rouge`."""

import re
import warnings
from collections.abc import Callable, Sequence
from functools import cache, lru_cache
from typing import Protocol

Words = tuple[str, ...]
Weights = tuple[float, ...]
# Weights of the n-grams of order 1 to 4.
INDIVIDUAL_WEIGHTS = ((1.0, 0.0, 0.0, 0.0), (0.0, 1.0, 0.0, 0.0), (0.0, 0.0, 1.0, 0.0))
CUMULATIVE_WEIGHTS = tuple(tuple([1 / order] * order) for order in range(1, 5))
_WEIGHTS = INDIVIDUAL_WEIGHTS + CUMULATIVE_WEIGHTS

_ROUGE_KINDS = ("rouge1", "rouge2", "rougeL")
_ROUGE_WORD = re.compile("[a-z0-9]+")  # what its tokenizer leaves


def bleu(
    truth: Words, answer: Words, weights: Sequence[Weights], smoothed: bool = False
) -> Sequence[float]:
    """nltk's `sentence_bleu` of an answer against one truth, once for each of the weights.

    Args:
        weights: of those above.
        smoothed: with `SmoothingFunction.method1`, else without smoothing.
    """
    if set(truth).isdisjoint(answer):  # nltk gives 0, too, but takes 100 times as long
        return [0.0] * len(weights)
    found = _bleus(truth, answer, smoothed)
    return [found[one] for one in weights]


@lru_cache(maxsize=1 << 10)
def _bleus(truth: Words, answer: Words, smoothed: bool) -> dict[Weights, float]:
    """BLEU by its weights, all at once: what takes time is the counting, which they share."""
    sentence_bleu, method1 = _nltk()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # "0 counts of 4-gram overlaps", for every short answer
        values = sentence_bleu(
            [truth], answer, weights=_WEIGHTS, smoothing_function=method1 if smoothed else None
        )
    return dict(zip(_WEIGHTS, map(float, values), strict=True))


@lru_cache(maxsize=1 << 10)
def rouge(truth: str, answer: str) -> dict[str, float]:
    """F measures `rouge1`, `rouge2`, `rougeL` of rouge-score, without stemming."""
    if not set(_ROUGE_WORD.findall(truth.lower())) & set(_ROUGE_WORD.findall(answer.lower())):
        return dict.fromkeys(_ROUGE_KINDS, 0.0)  # as rouge-score says, in a tenth of the time
    return {
        kind: float(score.fmeasure) for kind, score in _rouge_scorer().score(truth, answer).items()
    }


@cache
def _nltk() -> tuple[Callable[..., Sequence[float]], Callable[..., object]]:
    try:
        from nltk.translate.bleu_score import SmoothingFunction, sentence_bleu
    except ImportError as error:
        raise ImportError("BLEU needs nltk. Type: pip install 'moellava[eval]'") from error
    return sentence_bleu, SmoothingFunction().method1


class _RougeScore(Protocol):
    fmeasure: float


class _RougeScorer(Protocol):
    def score(self, target: str, prediction: str) -> dict[str, _RougeScore]: ...


@cache
def _rouge_scorer() -> _RougeScorer:
    try:
        from rouge_score.rouge_scorer import RougeScorer
    except ImportError as error:
        raise ImportError("ROUGE needs rouge-score. Type: pip install 'moellava[eval]'") from error
    scorer: _RougeScorer = RougeScorer(list(_ROUGE_KINDS))
    return scorer
