"""`medevalkit`: the scores that papers with MedEvalKit report, without its judge model."""

import re
from collections.abc import Sequence
from difflib import SequenceMatcher

from moellava.eval.scorers.ngrams import CUMULATIVE_WEIGHTS, bleu, rouge
from moellava.eval.scorers.registry import AnswerType, Metrics

_TAGGED = re.compile("<answer>(.*?)</answer>", re.DOTALL)
# In this order, each one applied to what the one before left.
_ANSWER_MARKS = (
    "**answer**:",
    "**answer**",
    "*answer*:",
    "**answer:**",
    "answer is",
    "answer:",
    "答案:",
    "final answer",
    "final answer is",
)


def medevalkit(
    answer: str, truth: str, *, answer_type: AnswerType, options: Sequence[str] = ()
) -> Metrics:
    r"""MedEvalKit (alibaba-damo-academy), its formulas under their right labels.

    Formula: the answer is lower-cased; a `\boxed{}` or `<answer>` in it is taken out, then what
    stands behind the last "answer is" and the like. Closed with a truth of yes or no: exactly one
    of the substrings "yes" and "no" is in the answer, and the truth is; any other closed truth:
    equality without newlines and periods. Choice: letter, else option text, else the option most
    similar by difflib. Open: equality, unsmoothed cumulative BLEU-1 to 4, ROUGE F measures, and
    precision, recall and F1 of the *sets* of words.

    Differences: its tables show F1 as precision, precision as recall and recall as F1, here the
    labels are right. ROUGE is from rouge-score, since the package that it uses is no longer kept.
    Its "accuracy" with a judge model is another number. Whether a question is closed is decided
    here by the data, there by whether the truth is yes or no.

    Known faults: "normal" is counted as no; "yes, there is no doubt" is wrong; the periods and
    commas of an open answer stay on its words; an unreadable choice still gets the most similar.
    """
    true, said = truth.lower(), _final_answer(answer.lower())
    if answer_type == "choice":
        right = float(_is_right_choice(answer.lower(), truth.strip().lower(), options))
        return {"choice_accuracy": right, "accuracy": right}
    if answer_type == "closed":
        verdict = said.replace("\n", "").replace(".", "")
        if true in ("yes", "no"):
            right = float((("yes" in verdict) ^ ("no" in verdict)) and true in verdict)
        else:
            right = float(verdict == true)
        return {"closed_accuracy": right, "accuracy": right}
    exact = float(said == true)
    precision, recall, f1 = _set_overlap(said, true)
    bleus = bleu(_spaced(true), _spaced(said), CUMULATIVE_WEIGHTS)
    rouges = rouge(true, said)
    return {
        "open_exact": exact,
        "open_precision": precision,
        "open_recall": recall,
        "open_f1": f1,
        **{f"open_bleu{order}": value for order, value in enumerate(bleus, start=1)},
        **{f"open_{kind.lower()}": value for kind, value in rouges.items()},
        "accuracy": exact,
    }


def _final_answer(text: str) -> str:
    if "boxed" in text:
        text = _boxed(text)
    elif "<answer>" in text:
        text = " ".join(_TAGGED.findall(text)).strip() or text
    for mark in _ANSWER_MARKS:
        text = text.rpartition(mark)[2]
    return text


def _boxed(text: str) -> str:
    r"""What the last `\boxed{...}` holds, inner braces included; the text itself if none."""
    begin = text.rfind("\\boxed{")
    depth = 0
    for place in range(begin, len(text)) if begin >= 0 else ():
        depth += {"{": 1, "}": -1}.get(text[place], 0)
        if text[place] == "}" and depth == 0:
            return text[begin + len("\\boxed{") : place].strip()
    return text


def _spaced(text: str) -> tuple[str, ...]:
    return tuple(text.replace(".", " .").split(" "))


def _set_overlap(said: str, true: str) -> tuple[float, float, float]:
    said_words, true_words = set(said.split()), set(true.split())
    num_shared = len(said_words & true_words)
    if not num_shared:
        return 0.0, 0.0, 0.0
    precision, recall = num_shared / len(said_words), num_shared / len(true_words)
    return precision, recall, 2 * precision * recall / (precision + recall)


def _is_right_choice(text: str, true: str, options: Sequence[str]) -> bool:
    letters = [chr(ord("a") + place) for place in range(len(options))]
    choices = [option.lower() for option in options]
    paragraphs = text.split("\n\n")
    if paragraphs[0] in letters:
        text = paragraphs[0]
    elif paragraphs[-1].split(".")[0] in letters:
        text = paragraphs[-1].split(".")[0]
    text = _final_answer(text).strip().replace("\n", "")
    said = text.split(".")[0].split(":")[-1]
    if said == true:
        return True
    if said in letters:
        return choices[letters.index(said)] == true
    if said in choices:
        return true in letters and choices[letters.index(true)] == said
    if not choices:
        return False
    # The first of the most similar, 0 if nothing is similar.
    similar = [SequenceMatcher(None, choice, text).ratio() for choice in choices]
    nearest = similar.index(max(similar))
    return true in (letters[nearest], choices[nearest])
