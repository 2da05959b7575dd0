"""Answers and truths for the scorers' tests: medical words, numbers, punctuation, any text."""

from hypothesis import strategies as st

_WORDS = st.sampled_from(
    """left right lung
    lungs the a an no yes none normal abnormal not diagnosis unknown x-ray xray CT
    two 2 3.5 3,000 5 cm mm mass in upper lobe isn't dont doesn't somebody'd ' . , .. don't, lung.
    (PA) yes, Yes. No, [x] a/b -- ok; "no" A B B. zero one e.g. 10. there is no doubt ten , answer:
    is <answer> </answer> 是 正常 肺。""".split()  # noqa: SIM905
)
TEXTS = st.one_of(
    st.lists(_WORDS, max_size=12).map(" ".join),
    st.lists(_WORDS, max_size=6).map("".join),
    st.text(max_size=20),
)
TRUTHS = TEXTS.filter(str.strip)
OPTIONS = st.lists(
    st.sampled_from(["left lung", "lung", "Liver", "heart", "x-ray", "both", "no"]),
    min_size=2,
    max_size=5,
    unique=True,
)
