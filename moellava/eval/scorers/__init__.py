"""Scorers: an answer and its truth in, metrics out; `SCORERS` has a row for each rule.

| name | use |
|---|---|
| `SCORERS`, `find_scorers` | the rules by name |
| `Scorer`, `register_scorer` | another rule; see docs/add_a_metric.md |
"""

from moellava.eval.scorers.llava_med import llava_med
from moellava.eval.scorers.mcq import mcq
from moellava.eval.scorers.med_moe import med_moe, med_moe_normalized
from moellava.eval.scorers.medevalkit import medevalkit
from moellava.eval.scorers.registry import (
    SCORERS,
    AnswerType,
    Metrics,
    Scorer,
    find_scorers,
    register_scorer,
)
from moellava.eval.scorers.slake_exact import slake_exact
from moellava.eval.scorers.strict import strict
from moellava.eval.scorers.token_f1 import token_f1

__all__ = [
    "SCORERS",
    "AnswerType",
    "Metrics",
    "Scorer",
    "find_scorers",
    "register_scorer",
]

for _function, _summary in (
    (strict, "ours: word boundaries, both named is wrong, quantities, negation"),
    (llava_med, "LLaVA-Med v1's run_eval, faults included"),
    (med_moe, "Med-MoE's run_eval on raw words, faults included"),
    (med_moe_normalized, "the same on normalised words, as its repository counts them"),
    (medevalkit, "MedEvalKit's formulas under right labels, without a judge"),
    (slake_exact, "lmms-eval's exact match for SLAKE"),
    (token_f1, "token F1, as MedGemma's tables have it"),
    (mcq, "multiple choice by letter or text; ambiguous is wrong"),
):
    register_scorer(Scorer(name=_function.__name__, version="1", score=_function, summary=_summary))
