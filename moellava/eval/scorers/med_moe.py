"""`med_moe`: the scores that Med-MoE reports."""

from collections.abc import Callable, Sequence

from moellava.eval.scorers.ngrams import INDIVIDUAL_WEIGHTS, bleu
from moellava.eval.scorers.registry import AnswerType, Metrics
from moellava.eval.scorers.vqa_words import normalize_words, word_overlap


def med_moe(
    answer: str, truth: str, *, answer_type: AnswerType, options: Sequence[str] = ()
) -> Metrics:
    """Med-MoE's `run_eval.py` (jiangsongtao/Med-MoE) on raw words, faults included.

    Formula: both texts are lower-cased, nothing else. Open: word recall, precision and F1 as
    `llava_med` counts them, nltk BLEU of single orders 1 to 3 with `method1` smoothing. Closed:
    right if the truth is a substring of the answer; recall, precision and F1 for closed answers,
    too. Other answer types are not scored, as there.

    Known faults: those of `llava_med` on substrings, both options and repeated words; and, since
    punctuation stays, "lung." and "lung" are different words. The repository's own functions for
    recall, precision, F1 and exact match normalise words before they count, which
    `med_moe_normalized` does.
    """
    return _scores(answer.lower(), truth.lower(), answer_type)


def med_moe_normalized(
    answer: str, truth: str, *, answer_type: AnswerType, options: Sequence[str] = ()
) -> Metrics:
    """Med-MoE's `run_eval.py` as its repository runs (jiangsongtao/Med-MoE at 148cbd6).

    Formula: as `med_moe`, but recall, precision, F1 and exact match are of normalised words
    (`normalize_words`), since `calculate_f1score` and `calculate_exactmatch`, which it took over
    from LLaVA-Med, normalise what they are given. BLEU and closed accuracy stay on the raw texts.

    Known faults: those of `llava_med` on normalisation and repeated words, those of `med_moe` on
    substrings and both options.
    """
    return _scores(answer.lower(), truth.lower(), answer_type, normalize_words)


def _scores(
    said: str, true: str, answer_type: AnswerType, normalize: Callable[[str], str] = str
) -> Metrics:
    if answer_type not in ("open", "closed"):
        return {}
    overlap = word_overlap(normalize(said), normalize(true))
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
