"""`med_moe`: the scores that Med-MoE reports."""

from collections.abc import Sequence

from moellava.eval.scorers.ngrams import INDIVIDUAL_WEIGHTS, bleu
from moellava.eval.scorers.registry import AnswerType, Metrics
from moellava.eval.scorers.vqa_words import word_overlap


def med_moe(
    answer: str, truth: str, *, answer_type: AnswerType, options: Sequence[str] = ()
) -> Metrics:
    """Med-MoE's `run_eval.py` (jiangsongtao/Med-MoE), faults included.

    Formula: both texts are lower-cased, nothing else. Open: word recall, precision and F1 as
    `llava_med` counts them, nltk BLEU of single orders 1 to 3 with `method1` smoothing. Closed:
    right if the truth is a substring of the answer; recall, precision and F1 for closed answers,
    too. Other answer types are not scored, as there.

    Known faults: those of `llava_med` on substrings, both options and repeated words; and, since
    punctuation stays, "lung." and "lung" are different words.
    """
    said, true = answer.lower(), truth.lower()
    if answer_type not in ("open", "closed"):
        return {}
    overlap = word_overlap(said, true)
    metrics = {
        f"{answer_type}_recall": overlap.recall,
        f"{answer_type}_precision": overlap.precision,
        f"{answer_type}_f1": overlap.f1,
    }
    if answer_type == "closed":
        return {"closed_accuracy": float(true in said), **metrics}
    bleus = bleu(tuple(true.split()), tuple(said.split()), INDIVIDUAL_WEIGHTS, smoothed=True)
    named = {f"open_bleu{order}": value for order, value in enumerate(bleus, start=1)}
    return {**metrics, "open_exact": overlap.exact, **named}
