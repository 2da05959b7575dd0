"""BLEU and ROUGE of one answer are those of the libraries, shortcuts included."""

import random
import warnings

import pytest
from nltk.translate.bleu_score import SmoothingFunction, sentence_bleu
from rouge_score.rouge_scorer import RougeScorer

from moellava.eval.scorers.ngrams import CUMULATIVE_WEIGHTS, INDIVIDUAL_WEIGHTS, bleu, rouge

WORDS = ["a", "left", "lung", "no", "Mass", "3.5", "cm"]
RNG = random.Random(0)
PAIRS = [
    tuple(" ".join(RNG.choices(WORDS, k=RNG.randint(0, 7))) for _ in range(2)) for _ in range(60)
]


@pytest.mark.parametrize("weights", [INDIVIDUAL_WEIGHTS, CUMULATIVE_WEIGHTS])
@pytest.mark.parametrize("smoothed", [False, True])
def test_bleu_is_nltks(weights, smoothed):
    function = SmoothingFunction().method1 if smoothed else None
    for truth, answer in PAIRS:
        words = tuple(truth.split()), tuple(answer.split())
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            expected = [
                sentence_bleu([words[0]], words[1], weights=one, smoothing_function=function)
                for one in weights
            ]
        assert bleu(*words, weights, smoothed) == pytest.approx(expected)


def test_rouge_is_rouge_scores():
    kinds = ["rouge1", "rouge2", "rougeL"]
    for truth, answer in PAIRS:
        found = rouge(truth, answer)
        expected = RougeScorer(kinds).score(truth, answer)
        assert found == pytest.approx({kind: expected[kind].fmeasure for kind in kinds})
