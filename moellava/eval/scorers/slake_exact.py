"""`slake_exact`: the accuracy of lmms-eval's SLAKE tasks."""

import re
import string
from collections.abc import Sequence
from functools import lru_cache

from moellava.eval.scorers.registry import AnswerType, Metrics

_BRACKETED, _WIDE_BRACKETED = re.compile(r"\([^)]*\)"), re.compile("（[^）]*）")
_CHINESE_MARKS = (
    "！？｡。＂＃＄％＆＇（）＊＋，－／：；＜＝＞＠［＼］＾＿｀｛｜｝～、，。；：《》？【】（）"
)
_TO_SPACES = str.maketrans(dict.fromkeys(string.punctuation + _CHINESE_MARKS, " "))
_YES = frozenset("yes yeah yep true 是 是的 有 包含 可以 能 会 正常".split())  # noqa: SIM905
_NO = frozenset(
    "no nope false 否 不是 没有 无 不包含 不能 不会 不可以 不正常 异常".split()  # noqa: SIM905
)


def slake_exact(
    answer: str, truth: str, *, answer_type: AnswerType, options: Sequence[str] = ()
) -> Metrics:
    """The exact match of lmms-eval 0.7's `slake_en` and `slake_zh`.

    Formula: lower-case both texts, delete what stands in brackets, turn English and Chinese
    punctuation into spaces, call "x ray" xray, and a whole text of "yeah" or "true" yes (the same
    for no, and in Chinese); right if they are equal.

    Known faults: "yes, it is" is wrong; several organs must be in the truth's order; a Chinese
    正常 (normal) is yes and 异常 (abnormal) no, whatever was asked.
    """
    right = float(_normalize(answer) == _normalize(truth))
    kind = "open_exact" if answer_type == "open" else f"{answer_type}_accuracy"
    return {kind: right, "accuracy": right}


@lru_cache(maxsize=1 << 16)
def _normalize(text: str) -> str:
    text = _WIDE_BRACKETED.sub(" ", _BRACKETED.sub(" ", text.lower()))
    text = " ".join(text.translate(_TO_SPACES).split())
    if text in _YES:
        return "yes"
    if text in _NO:
        return "no"
    return "xray" if text == "x ray" else text
