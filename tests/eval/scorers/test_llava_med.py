"""`llava_med` against a plain rewriting of the published formulas, faults included."""

import re

import pytest
from hypothesis import given, settings
from nltk.translate.bleu_score import sentence_bleu

from moellava.eval.scorers.llava_med import llava_med
from tests.eval.scorers.pairs import TEXTS, TRUTHS

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")  # nltk on short answers

PUNCTUATION = list(';/[]"{}()=+\\_-><@`,?!')
NUMBERS = "none zero one two three four five six seven eight nine ten"
DIGITS = dict(
    zip(NUMBERS.split(), ["0", "0", "1", "2", "3", "4", "5", "6", "7", "8", "9", "10"], strict=True)
)
# Those that the generated texts can hold.
CONTRACTIONS = {"dont": "don't", "isnt": "isn't", "somebody'd": "somebodyd", "doesnt": "doesn't"}


def published_normalize(text):
    out = text
    for mark in PUNCTUATION:
        if mark + " " in text or " " + mark in text or re.search(r"(\d)(,)(\d)", text):
            out = out.replace(mark, "")
        else:
            out = out.replace(mark, " ")
    out = re.sub(r"(?!<=\d)(\.)(?!\d)", "", out, count=32)
    words = [DIGITS.get(word, word) for word in out.lower().split()]
    words = [word for word in words if word not in ("a", "an", "the")]
    return " ".join(CONTRACTIONS.get(word, word) for word in words).replace(",", "")


def published_words(text):
    counts = {}
    for word in text.lower().strip().split():
        counts[word] = counts.get(word, 0) + 1
    return counts


def published_exact(said, true):
    said, true = published_words(said), published_words(true)
    total = sum(said.values())
    return sum(1 for word in true if word in said) / total if total else 0.0


def published_f1(said, true):
    said, true = published_words(said), published_words(true)
    if not said or not true:
        return 0.0, 0.0, 0.0
    tp = fp = fn = 0
    for word in set(said) | set(true):
        if word in said and word in true:
            tp += said[word]
        elif word in said:
            fp += said[word]
        else:
            fn += true[word]
    if tp == 0:
        return 0.0, 0.0, 0.0
    precision, recall = tp / (tp + fp), tp / (tp + fn)
    return 2 * precision * recall / (precision + recall), precision, recall


@settings(max_examples=400, deadline=None)
@given(answer=TEXTS, truth=TRUTHS)
def test_open_metrics_equal_the_published_formulas(answer, truth):
    said, true = published_normalize(answer.lower()), published_normalize(truth.lower())
    f1, precision, recall = published_f1(said, true)

    def published_bleu(weights):
        return sentence_bleu([true.split()], said.split(), weights=weights)

    assert llava_med(answer, truth, answer_type="open") == pytest.approx(
        {
            "open_exact": published_exact(said, true),
            "open_f1": f1,
            "open_precision": precision,
            "open_recall": recall,
            "open_bleu1": published_bleu((1, 0, 0, 0)),
            "open_bleu2": published_bleu((0, 1, 0, 0)),
            "open_bleu3": published_bleu((0, 0, 1, 0)),
            "open_bleu4": published_bleu((0.25, 0.25, 0.25, 0.25)),
        }
    )


@settings(max_examples=300, deadline=None)
@given(answer=TEXTS, truth=TRUTHS)
def test_closed_needs_yes_or_no_and_the_truth_as_substrings(answer, truth):
    said, true = published_normalize(answer.lower()), published_normalize(truth.lower())
    expected = float(("yes" in said or "no" in said) and true in said)
    assert llava_med(answer, truth, answer_type="closed") == {"closed_accuracy": expected}


@pytest.mark.parametrize(
    ("answer", "truth", "metric", "value"),
    [
        ("lung", "left lung", "open_exact", 1.0),
        ("left left left left", "left lung", "open_recall", 0.8),
        ("left left left lung", "left lung", "open_f1", 1.0),
        ("A", "A", "open_recall", 0.0),
        ("none", "zero", "open_recall", 1.0),
    ],
)
def test_known_faults_of_open_scores_are_kept(answer, truth, metric, value):
    assert llava_med(answer, truth, answer_type="open")[metric] == pytest.approx(value)


@pytest.mark.parametrize("answer", ["normal", "unknown", "the diagnosis", "yes, there is no doubt"])
def test_no_is_found_inside_other_words(answer):
    assert llava_med(answer, "no", answer_type="closed") == {"closed_accuracy": 1.0}


def test_a_closed_question_about_a_side_is_wrong_without_yes_or_no():
    assert llava_med("left", "left", answer_type="closed") == {"closed_accuracy": 0.0}


def test_choices_are_not_scored():
    assert llava_med("A", "A", answer_type="choice") == {}


def test_a_repaired_formula_would_not_pass():
    """The oracle can say no: recall of multisets differs on a repeated word."""
    assert published_f1("left left left left", "left lung")[2] != pytest.approx(0.5)
