"""The words of an answer as `strict` and `mcq` compare them: `answer_words`, `contains_phrase`."""

import re
from collections import Counter
from collections.abc import Sequence
from functools import lru_cache

Words = tuple[str, ...]

# A quantity, else a Chinese character, else a word: hyphens and all other marks separate words.
_TOKEN = re.compile(
    r"(?P<number>\d+(?:,\d{3})+(?:\.\d+)?|\d+(?:\.\d+)?)"
    r"(?:\s*(?P<unit>mm|cm|millimet(?:er|re)s?|centimet(?:er|re)s?)(?![^\W\d_]))?"
    r"|[\u3400-\u9fff]"
    r"|[^\W\d_\u3400-\u9fff]+(?:['’][^\W\d_\u3400-\u9fff]+)*"
    r"|%"
)
_NUMBERS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")
_DIGITS = {word: str(number) for number, word in enumerate(_NUMBERS)}
_ARTICLES = frozenset({"a", "an", "the"})
_SPELLINGS = {"xray": ("x", "ray"), "xrays": ("x", "ray"), "percent": ("%",)}


@lru_cache(maxsize=1 << 16)
def answer_words(text: str) -> Words:
    """Lower-case words without articles; numbers and lengths in one form.

    "Two" is 2, "3,000" is 3000, "5 cm", "5cm" and "50 mm" are one word. A text of articles alone
    keeps them, since it may be the letter of an option.
    """
    words: list[str] = []
    for match in _TOKEN.finditer(text.casefold()):
        if match["number"]:
            words.append(_quantity(match["number"], match["unit"]))
        else:
            word = match[0].replace("’", "'")
            words += _SPELLINGS.get(word, (_DIGITS.get(word, word),))
    return tuple(word for word in words if word not in _ARTICLES) or tuple(words)


def contains_phrase(words: Sequence[str], phrase: Sequence[str]) -> bool:
    """Whether the words of a phrase stand next to each other, in order."""
    return bool(phrase_places(words, phrase))


def phrase_places(words: Sequence[str], phrase: Sequence[str]) -> list[int]:
    """Where a phrase begins in the words; an empty phrase stands nowhere."""
    length = len(phrase)
    starts = range(len(words) - length + 1) if length else ()
    return [start for start in starts if tuple(words[start : start + length]) == tuple(phrase)]


def num_shared_words(words: Counter[str], others: Counter[str]) -> int:
    """`(words & others).total()`, in a fraction of the time."""
    return sum(min(words[word], others[word]) for word in words.keys() & others.keys())


def _quantity(number: str, unit: str | None) -> str:
    value = float(number.replace(",", ""))
    if unit is None:
        return f"{value:g}" if value < 1e6 else f"{value:.0f}"
    return f"{value * (10 if unit.startswith('c') else 1):g}mm"
