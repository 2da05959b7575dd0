"""`llava_med`: the scores that LLaVA-Med's first release reports."""

from collections.abc import Sequence

from moellava.eval.scorers.ngrams import CUMULATIVE_WEIGHTS, INDIVIDUAL_WEIGHTS, bleu
from moellava.eval.scorers.registry import AnswerType, Metrics
from moellava.eval.scorers.vqa_words import normalize_words, word_overlap

_WEIGHTS = (*INDIVIDUAL_WEIGHTS, CUMULATIVE_WEIGHTS[3])


def llava_med(
    answer: str, truth: str, *, answer_type: AnswerType, options: Sequence[str] = ()
) -> Metrics:
    """LLaVA-Med v1's `run_eval.py` (microsoft/LLaVA-Med at b9a98a7), faults included.

    Formula: both texts are lower-cased and normalised (`normalize_words`). Open: word recall,
    precision and F1 (`word_overlap`), unsmoothed nltk BLEU of single orders 1 to 3 and cumulative
    BLEU-4. Closed: right if "yes" or "no" is a substring of the answer, and the truth is, too.
    Other answer types are not scored, and the "open accuracy" of its candidate set is left out,
    since the set was never released.

    Known faults: "no" is found in normal, unknown and diagnosis, and in "yes, there is no doubt";
    an answer that names both passes; closed questions about anything else ("left or right?") are
    wrong unless the answer also has yes or no in it; repeated words raise recall; "exact" is a
    precision; "A" normalises to nothing, and "none" to 0.
    """
    said, true = normalize_words(answer.lower()), normalize_words(truth.lower())
    if answer_type == "closed":
        has_verdict = "yes" in said or "no" in said
        return {"closed_accuracy": float(has_verdict and true in said)}
    if answer_type != "open":
        return {}
    overlap = word_overlap(said, true)
    bleu1, bleu2, bleu3, bleu4 = bleu(tuple(true.split()), tuple(said.split()), _WEIGHTS)
    return {
        "open_recall": overlap.recall,
        "open_precision": overlap.precision,
        "open_f1": overlap.f1,
        "open_exact": overlap.exact,
        "open_bleu1": bleu1,
        "open_bleu2": bleu2,
        "open_bleu3": bleu3,
        "open_bleu4": bleu4,
    }
