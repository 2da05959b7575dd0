"""The table of rules in docs/evaluation.md is what the scorers say; docs/add_a_metric.md runs."""

import re
from pathlib import Path

import pytest

from moellava.eval.scorers import SCORERS, find_scorers

DOCS = Path(__file__).parents[2] / "docs"
OPTIONS = ("left lung", "right lung", "lung")
NAMES = ("llava_med", "med_moe", "medevalkit", "slake_exact", "strict", "token_f1", "mcq")
# What the table shows of each type: the first that a scorer has.
SHOWN = {
    "closed": ("closed_accuracy", "closed_f1"),
    "choice": ("choice_accuracy", "choice_f1"),
    "open": ("open_recall", "open_f1", "open_exact"),
}
# Answer type, truth, answer.
TELLING = [
    ("closed", "no", "normal"),
    ("closed", "no", "unknown"),
    ("closed", "yes", "Yes, there is no doubt"),
    ("closed", "no", "There is no fracture"),
    ("closed", "no", "yes and no"),
    ("closed", "yes", "True."),
    ("closed", "left", "left"),
    ("closed", "left", "left or right"),
    ("choice", "left lung", "A"),
    ("choice", "left lung", "A. left lung"),
    ("choice", "left lung", "A or B"),
    ("choice", "lung", "the left lung"),
    ("open", "lung", "left lung"),
    ("open", "left lung", "lung"),
    ("open", "left lung", "left left left left"),
    ("open", "lung", "The lung."),
    ("open", "fracture", "no fracture"),
    ("open", "0", "none"),
    ("open", "50 mm", "5 cm"),
    ("open", "x-ray", "X ray"),
]


def table_lines():
    yield f"| type | truth | answer | {' | '.join(f'`{name}`' for name in NAMES)} |"
    yield "|---|---|---|" + "---|" * len(NAMES)
    for answer_type, truth, answer in TELLING:
        options = OPTIONS if answer_type == "choice" else ()
        cells = []
        for scorer in find_scorers(NAMES):
            scored = scorer.score(answer, truth, answer_type=answer_type, options=options)
            found = [scored[name] for name in SHOWN[answer_type] if name in scored]
            cells.append(f"{found[0]:.2f}".rstrip("0").rstrip(".") if found else "–")
        yield f"| {answer_type} | {truth} | {answer} | {' | '.join(cells)} |"


def test_the_table_of_twenty_answers_is_what_the_scorers_say():
    assert len(TELLING) == 20
    assert "\n".join(table_lines()) in (DOCS / "evaluation.md").read_text(encoding="utf-8")


def test_every_scorer_is_explained_in_the_guide():
    text = (DOCS / "evaluation.md").read_text(encoding="utf-8")
    for name in NAMES:
        assert f"| `{name}` {SCORERS[name].version} |" in text


@pytest.fixture
def restored_scorers():
    before = dict(SCORERS)
    yield
    SCORERS.clear()
    SCORERS.update(before)


def test_the_worked_example_of_a_metric_runs(restored_scorers):
    text = (DOCS / "add_a_metric.md").read_text(encoding="utf-8")
    blocks = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    assert len(blocks) == 3
    names: dict[str, object] = {}
    for block in blocks:
        exec(block, names)
    assert "laterality" in SCORERS
