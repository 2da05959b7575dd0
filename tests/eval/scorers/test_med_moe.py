"""`med_moe` against a plain rewriting of the published formulas."""

import pytest
from hypothesis import given, settings
from nltk.translate.bleu_score import SmoothingFunction, sentence_bleu

from moellava.eval.scorers.med_moe import med_moe, med_moe_normalized
from tests.eval.scorers.pairs import TEXTS, TRUTHS
from tests.eval.scorers.test_llava_med import (
    published_exact,
    published_f1,
    published_normalize,
)

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")


@settings(max_examples=400, deadline=None)
@given(answer=TEXTS, truth=TRUTHS)
def test_open_metrics_equal_the_published_formulas(answer, truth):
    said, true = answer.lower(), truth.lower()
    f1, precision, recall = published_f1(said, true)

    def published_bleu(weights):
        return sentence_bleu(
            [true.split()],
            said.split(),
            weights=weights,
            smoothing_function=SmoothingFunction().method1,
        )

    assert med_moe(answer, truth, answer_type="open") == pytest.approx(
        {
            "open_exact": published_exact(said, true),
            "open_f1": f1,
            "open_precision": precision,
            "open_recall": recall,
            "open_bleu1": published_bleu((1, 0, 0, 0)),
            "open_bleu2": published_bleu((0, 1, 0, 0)),
            "open_bleu3": published_bleu((0, 0, 1, 0)),
        }
    )


@settings(max_examples=300, deadline=None)
@given(answer=TEXTS, truth=TRUTHS)
def test_closed_is_a_raw_substring(answer, truth):
    f1, precision, recall = published_f1(answer.lower(), truth.lower())
    assert med_moe(answer, truth, answer_type="closed") == pytest.approx(
        {
            "closed_accuracy": float(truth.lower() in answer.lower()),
            "closed_recall": recall,
            "closed_precision": precision,
            "closed_f1": f1,
        }
    )


def test_both_options_named_passes_and_punctuation_stays():
    assert med_moe("left or right", "left", answer_type="closed")["closed_accuracy"] == 1.0
    assert med_moe("lung.", "lung", answer_type="open")["open_recall"] == 0.0


@settings(max_examples=300, deadline=None)
@given(answer=TEXTS, truth=TRUTHS)
def test_the_repository_counts_normalised_words_beside_raw_bleu(answer, truth):
    said, true = published_normalize(answer.lower()), published_normalize(truth.lower())
    f1, precision, recall = published_f1(said, true)
    raw = med_moe(answer, truth, answer_type="open")
    assert med_moe_normalized(answer, truth, answer_type="open") == pytest.approx(
        {
            **{name: raw[name] for name in ("open_bleu1", "open_bleu2", "open_bleu3")},
            "open_exact": published_exact(said, true),
            "open_f1": f1,
            "open_precision": precision,
            "open_recall": recall,
        }
    )
    closed = med_moe_normalized(answer, truth, answer_type="closed")
    assert closed["closed_accuracy"] == float(truth.lower() in answer.lower())
    assert closed["closed_recall"] == pytest.approx(recall)


def test_choices_are_not_scored():
    assert med_moe("A", "A", answer_type="choice") == {}
    assert med_moe_normalized("A", "A", answer_type="choice") == {}
