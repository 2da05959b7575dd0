"""`slake_exact` against a plain rewriting of lmms-eval's rule."""

import re
import string

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moellava.eval.scorers.slake_exact import slake_exact
from tests.eval.scorers.pairs import TEXTS, TRUTHS

WIDE = "！？｡。＂＃＄％＆＇（）＊＋，－／：；＜＝＞＠［＼］＾＿｀｛｜｝～、，。；：《》？【】（）"
YES = ["yes", "yeah", "yep", "true", "是", "是的", "有", "包含", "可以", "能", "会", "正常"]
NO = "no nope false 否 不是 没有 无 不包含 不能 不会 不可以 不正常 异常".split()  # noqa: SIM905


def published_normalize(text):
    text = text.strip().lower()
    text = re.sub(r"\([^)]*\)", " ", text)
    text = re.sub(r"（[^）]*）", " ", text)
    text = "".join(" " if letter in string.punctuation + WIDE else letter for letter in text)
    text = re.sub(r"\s+", " ", text).strip()
    if text in ("x ray", "xray"):
        return "xray"
    return "yes" if text in YES else "no" if text in NO else text


@settings(max_examples=500, deadline=None)
@given(
    answer=st.one_of(TEXTS, st.sampled_from([*YES, *NO, "X-Ray", "(a) b（c）", "Yes."])),
    truth=st.one_of(TRUTHS, st.sampled_from([*YES, *NO, "xray", "b"])),
    answer_type=st.sampled_from(["open", "closed", "choice"]),
)
def test_equals_the_published_rule(answer, truth, answer_type):
    expected = float(published_normalize(answer) == published_normalize(truth))
    kind = "open_exact" if answer_type == "open" else f"{answer_type}_accuracy"
    assert slake_exact(answer, truth, answer_type=answer_type) == {
        kind: expected,
        "accuracy": expected,
    }


@pytest.mark.parametrize(
    ("answer", "truth", "right"),
    [
        ("X-Ray", "x ray", 1.0),
        ("yes, it is", "yes", 0.0),
        ("True.", "yes", 1.0),
        ("lung spinal cord", "spinal cord lung", 0.0),
        ("正常", "yes", 1.0),
    ],
)
def test_telling_answers(answer, truth, right):
    assert slake_exact(answer, truth, answer_type="closed")["accuracy"] == right
