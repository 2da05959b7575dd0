"""Counts of what was answered by what is true."""

from moellava.eval.confusion import NEITHER, confusion_tables
from tests.eval.samples import prediction


def test_confusion_counts_both_and_neither_apart():
    rows = [
        prediction(0, "yes"), prediction(1, "no"), prediction(2, "yes and no"),
        prediction(3, "normal", "no"), prediction(4, "no", "no"),
    ]  # fmt: skip
    [table] = confusion_tables(rows)
    assert table.counts == {
        ("yes", "yes"): 1, ("yes", "no"): 1, ("yes", NEITHER): 1, ("no", NEITHER): 1,
        ("no", "no"): 1,
    }  # fmt: skip


def test_confusion_of_options_that_questions_share():
    options = ("lung", "heart")
    rows = [
        prediction(n, answer, "lung", "choice", options=options)
        for n, answer in enumerate(["A", "heart", "A or B"])
    ]
    [table] = confusion_tables(rows)
    assert table.counts == {("lung", "lung"): 1, ("lung", "heart"): 1, ("lung", NEITHER): 1}
