"""`medevalkit` against a plain rewriting of the published formulas under their right labels."""

from difflib import SequenceMatcher

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from nltk.translate.bleu_score import sentence_bleu
from rouge_score.rouge_scorer import RougeScorer

from moellava.eval.scorers.medevalkit import medevalkit
from tests.eval.scorers.pairs import OPTIONS, TEXTS, TRUTHS

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")

MARKS = [
    "**answer**:", "**answer**", "*answer*:", "**answer:**", "answer is", "answer:", "答案:",
    "final answer", "final answer is",
]  # fmt: skip


def published_parse(text):
    text = text.lower()
    if "<answer>" in text:
        inside, rest = "", text
        while "<answer>" in rest:
            _, _, rest = rest.partition("<answer>")
            if "</answer>" not in rest:
                break
            part, _, rest = rest.partition("</answer>")
            inside += part + " "
        text = inside.strip() or text
    for mark in MARKS:
        if mark in text:
            text = text.split(mark)[-1]
    return text


def published_sets(said, true):
    said, true = set(said.split()), set(true.split())
    if not said or not true or not said & true:
        return 0.0, 0.0, 0.0
    precision, recall = len(said & true) / len(said), len(said & true) / len(true)
    return precision, recall, 2 * precision * recall / (precision + recall)


@settings(max_examples=400, deadline=None)
@given(answer=TEXTS, truth=TRUTHS)
def test_open_metrics_equal_the_published_formulas(answer, truth):
    said, true = published_parse(answer), truth.lower()
    precision, recall, f1 = published_sets(said, true)

    def published_bleu(order):
        tokens = [text.lower().replace(".", " .").split(" ") for text in (true, said)]
        return sentence_bleu([tokens[0]], tokens[1], weights=[1 / order] * order)

    rouge = RougeScorer(["rouge1", "rouge2", "rougeL"]).score(true, said)
    assert medevalkit(answer, truth, answer_type="open") == pytest.approx(
        {
            "open_exact": float(said == true),
            "open_precision": precision,
            "open_recall": recall,
            "open_f1": f1,
            **{f"open_bleu{order}": published_bleu(order) for order in (1, 2, 3, 4)},
            "open_rouge1": rouge["rouge1"].fmeasure,
            "open_rouge2": rouge["rouge2"].fmeasure,
            "open_rougel": rouge["rougeL"].fmeasure,
            "accuracy": float(said == true),
        }
    )


@settings(max_examples=400, deadline=None)
@given(answer=TEXTS, truth=st.sampled_from(["yes", "no", "Left", "both lungs"]))
def test_closed_is_exactly_one_of_the_substrings_else_equality(answer, truth):
    said = published_parse(answer).replace("\n", "").replace(".", "")
    true = truth.lower()
    if true in ("yes", "no"):
        expected = float((("yes" in said) != ("no" in said)) and true in said)
    else:
        expected = float(said == true)
    scored = medevalkit(answer, truth, answer_type="closed")
    assert scored == {"closed_accuracy": expected, "accuracy": expected}


def published_choice(choices, answer, response):
    response, answer = response.lower(), answer.strip().lower()
    choices = [choice.lower() for choice in choices]
    letters = "abcdefgh"[: len(choices)]
    first, last = response.split("\n\n")[0], response.split("\n\n")[-1].split(".")[0]
    if first in list(letters):
        response = first
    elif last in list(letters):
        response = last
    response = published_parse(response).strip().replace("\n", "")
    short = response.split(".")[0].split(":")[-1]
    if short == answer:
        return True
    if short in list(letters):
        return choices[letters.index(short)] == answer
    if short in choices:
        return answer in list(letters) and short == choices[letters.index(answer)]
    best, highest = 0, 0.0
    for index, choice in enumerate(choices):
        ratio = SequenceMatcher(None, choice, response).ratio()
        if ratio > highest:
            best, highest = index, ratio
    return answer in (letters[best], choices[best])


@settings(max_examples=400, deadline=None)
@given(data=st.data(), options=OPTIONS)
def test_choice_is_letter_then_text_then_the_most_similar(data, options):
    truth = data.draw(st.sampled_from([*options, *"ABCDE"[: len(options)]]))
    answer = data.draw(st.one_of(TEXTS, st.sampled_from([*options, *"ABCDE", "B.", "answer: c"])))
    expected = float(published_choice(options, truth, answer))
    scored = medevalkit(answer, truth, answer_type="choice", options=options)
    assert scored == {"choice_accuracy": expected, "accuracy": expected}


@pytest.mark.parametrize(
    ("answer", "taken"),
    [
        (r"so \boxed{left lung} it is", "left lung"),
        (r"so \boxed{ left lung } it is", "left lung"),
        (r"first \boxed{no}, then \boxed{a{b}c}", "a{b}c"),
        ("boxed in", "boxed in"),
        ("<answer>Left</answer> and <answer>lung</answer>", "left lung"),
        ("The final answer is: lung", ": lung"),
    ],
)
def test_the_final_answer_is_taken_out(answer, taken):
    assert medevalkit(answer, taken, answer_type="open")["open_exact"] == 1.0


def test_known_faults_are_kept():
    assert medevalkit("normal", "no", answer_type="closed")["closed_accuracy"] == 1.0
    doubtless = medevalkit("yes, there is no doubt", "yes", answer_type="closed")
    assert doubtless["closed_accuracy"] == 0.0


def test_labels_are_not_rotated():
    scored = medevalkit("left upper lung", "lung", answer_type="open")
    assert scored["open_recall"] == 1.0
    assert scored["open_precision"] == pytest.approx(1 / 3)
