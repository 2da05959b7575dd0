"""BLEU and ROUGE of one answer, from nltk and rouge-score: `bleu`, `rouge`."""

import re
import warnings
from collections.abc import Callable, Mapping, Sequence
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
    found = _bleus(*_numbered(truth, answer), smoothed)
    return [found[one] for one in weights]


def _numbered(truth: Sequence[str], answer: Sequence[str]) -> tuple[Words, Words]:
    """Both with a number in place of each word.

    n-grams that are equal stay equal, so that no score changes; and short answers whose words meet
    in the same way, of which there are few, need one call of a library for all.
    """
    numbers: dict[str, str] = {}
    first, second = (
        tuple(numbers.setdefault(word, str(len(numbers))) for word in words)
        for words in (truth, answer)
    )
    return first, second


@lru_cache(maxsize=1 << 14)
def _bleus(truth: Words, answer: Words, smoothed: bool) -> dict[Weights, float]:
    """BLEU by its weights, all at once: what takes time is the counting, which they share."""
    sentence_bleu, method1 = _nltk()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # "0 counts of 4-gram overlaps", for every short answer
        values = sentence_bleu(
            [truth], answer, weights=_WEIGHTS, smoothing_function=method1 if smoothed else None
        )
    return dict(zip(_WEIGHTS, map(float, values), strict=True))


def rouge(truth: str, answer: str) -> Mapping[str, float]:
    """F measures `rouge1`, `rouge2`, `rougeL` of rouge-score, without stemming."""
    true, said = (_ROUGE_WORD.findall(text.lower()) for text in (truth, answer))
    if set(true).isdisjoint(said):
        return dict.fromkeys(_ROUGE_KINDS, 0.0)  # as rouge-score says, in a tenth of the time
    return _rouges(*_numbered(true, said))


@lru_cache(maxsize=1 << 14)
def _rouges(truth: Words, answer: Words) -> dict[str, float]:
    scores = _rouge_scorer().score(" ".join(truth), " ".join(answer))
    return {kind: float(score.fmeasure) for kind, score in scores.items()}


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
