"""The words of an answer as LLaVA-Med and Med-MoE count them: `normalize_words`, `word_overlap`.

Both follow the answer normalisation of VQA v2 as those projects carry it, faults included.
"""

import re
from collections import Counter
from functools import lru_cache
from typing import NamedTuple

_PUNCTUATION = ';/[]"{}()=+\\_-><@`,?!'
_COMMA_IN_NUMBER = re.compile(r"\d,\d")
# What VQA v2 writes for "a period that is not inside a number": `(?!<=\d)` is a mistyped lookbehind
# and never fails, so that only the digit behind the period counts.
_PERIOD = re.compile(r"(?!<=\d)\.(?!\d)")
_MOST_PERIODS = 32  # re.UNICODE, passed there as the number of replacements
_NUMBERS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")
_DIGITS = {"none": "0"} | {word: str(number) for number, word in enumerate(_NUMBERS)}
_ARTICLES = frozenset({"a", "an", "the"})
_CONTRACTED = """
    ain't aren't can't could've couldn't couldn't've didn't doesn't don't hadn't hadn't've hasn't
    haven't he'd he'd've he's how'd how'll how's isn't it'd it'd've it'll ma'am mightn't mightn't've
    might've mustn't must've needn't not've o'clock oughtn't shan't she'd've should've shouldn't
    shouldn't've somebody'd've somebody'll somebody's someone'd someone'd've someone'll someone's
    something'd something'd've something'll that's there'd there'd've there're there's they'd
    they'd've they'll they're they've 'twas wasn't we'd've we've weren't what'll what're what's
    what've when's where'd where's where've who'd who'd've who'll who's who've why'll why're why's
    won't would've wouldn't wouldn't've y'all y'all'll y'all'd've you'd you'd've you'll you're
    you've 'ow's'at
""".split()  # noqa: SIM905  # a table of words


def _without_one_apostrophe(word: str) -> list[str]:
    places = [place for place, letter in enumerate(word) if letter == "'"]
    return [word[:place] + word[place + 1 :] for place in places]


_CONTRACTIONS = {typed: word for word in _CONTRACTED for typed in _without_one_apostrophe(word)} | {
    "somebody'd": "somebodyd"
}  # the other way round, as VQA v2's table has it


@lru_cache(maxsize=1 << 16)
def normalize_words(text: str) -> str:
    """`normalize_word` of LLaVA-Med: punctuation, number words, articles and contractions.

    A punctuation mark that touches a space anywhere in the text is deleted, else it becomes a
    space; a comma inside a number anywhere deletes all of them. "none" and "zero" are both 0.
    """
    has_number_comma = _COMMA_IN_NUMBER.search(text) is not None
    plain = text
    for mark in _PUNCTUATION:
        if mark in plain:
            is_deleted = has_number_comma or f"{mark} " in text or f" {mark}" in text
            plain = plain.replace(mark, "" if is_deleted else " ")
    plain = _PERIOD.sub("", plain, count=_MOST_PERIODS)
    words = [_DIGITS.get(word, word) for word in plain.lower().split()]
    kept = [_CONTRACTIONS.get(word, word) for word in words if word not in _ARTICLES]
    return " ".join(kept).replace(",", "")


class Overlap(NamedTuple):
    """Shares in 0..1; `exact` is what LLaVA-Med calls exact match."""

    exact: float
    f1: float
    precision: float
    recall: float


@lru_cache(maxsize=1 << 10)
def word_overlap(answer: str, truth: str) -> Overlap:
    """LLaVA-Med's `calculate_exactmatch` and `calculate_f1score`.

    `exact` is the number of distinct words of the truth that the answer has, divided by the number
    of the answer's words. True positives of recall and precision are counted in the *answer*, so
    that a repeated word raises recall.
    """
    said, true = _counts(answer.lower()), _counts(truth.lower())
    shared = said.keys() & true.keys()
    if not shared:
        return Overlap(0.0, 0.0, 0.0, 0.0)
    num_said = said.total()
    exact = len(shared) / num_said
    num_shared = sum(said[word] for word in shared)
    num_missed = true.total() - sum(true[word] for word in shared)
    precision, recall = num_shared / num_said, num_shared / (num_shared + num_missed)
    return Overlap(exact, 2 * precision * recall / (precision + recall), precision, recall)


@lru_cache(maxsize=1 << 16)
def _counts(text: str) -> Counter[str]:
    return Counter(text.split())
