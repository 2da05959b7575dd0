"""Which option an answer names: `named_options`, and `option_of_truth` for the truth."""

import re
from collections.abc import Sequence
from functools import lru_cache

from moellava.eval.scorers.words import answer_words, phrase_places

_FINAL = re.compile(r"<answer>(.*?)</answer>|\\boxed\{([^{}]*)\}", re.DOTALL)
_LEAD_IN = re.compile(r".*\banswer\s*(?:is|:)\s*", re.DOTALL | re.IGNORECASE)
# A capital letter in brackets, before punctuation, or beside "or" with another one; "A mass" has an
# article.
_LETTER = re.compile(
    r"\(([A-Za-z])\)|\b(?:[Oo]ption|[Cc]hoice)\s+([A-Za-z])\b"
    r"|\b([A-Z])(?=[.):,;]|\s*$|\s+(?:or|and)\s+\(?[A-Z]\b)"
)


@lru_cache(maxsize=1 << 16)
def named_options(answer: str, options: tuple[str, ...]) -> frozenset[int]:
    """The options that an answer names, by letter or by text: none, one, or several.

    If the answer has an `<answer>`, a boxed part or "the answer is", only what stands there
    counts. An option inside a longer one that is named ("lung" in "left lung") is not named by it.
    """
    text = _final_part(answer)
    alone = _letter_index(text.strip(" \n\t.:;,()[]*\"'"), len(options))
    if alone is not None:
        return frozenset({alone})
    whole = [
        index for index, option in enumerate(options) if answer_words(option) == answer_words(text)
    ]
    if whole:
        return frozenset(whole[:1])
    letters = (
        _letter_index("".join(match.groups("")), len(options)) for match in _LETTER.finditer(text)
    )
    return frozenset(index for index in letters if index is not None) | _named_by_text(
        text, options
    )


def option_of_truth(truth: str, options: Sequence[str]) -> int | None:
    """The index of the right option, given by text or letter; None if it is not an option."""
    words = answer_words(truth)
    for index, option in enumerate(options):
        if answer_words(option) == words:
            return index
    return _letter_index(truth.strip(" .:()"), len(options))


def _final_part(answer: str) -> str:
    tagged = [first or second for first, second in _FINAL.findall(answer)]
    return tagged[-1] if tagged else _LEAD_IN.sub("", answer, count=1)


def _letter_index(text: str, num_options: int) -> int | None:
    if len(text) != 1 or not text.isascii() or not text.isalpha():
        return None
    index = ord(text.upper()) - ord("A")
    return index if index < num_options else None


def _named_by_text(text: str, options: Sequence[str]) -> frozenset[int]:
    words = list(answer_words(text))
    named = set()
    by_length = sorted(range(len(options)), key=lambda index: -len(answer_words(options[index])))
    for index in by_length:  # the longest first, so that its words are not found again in it
        phrase = answer_words(options[index])
        for start in phrase_places(words, phrase):
            named.add(index)
            words[start : start + len(phrase)] = [""] * len(phrase)
    return frozenset(named)
