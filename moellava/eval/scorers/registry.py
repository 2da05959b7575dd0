"""Named rules that score an answer: `Scorer`, `SCORERS`, `register_scorer`, `find_scorers`."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

from moellava.messages import unknown_name
from moellava.plugins import load_plugins

AnswerType = Literal["open", "closed", "choice"]
Metrics = Mapping[str, float]

PLUGIN_GROUP = "moellava.scorers"


class ScoreFunction(Protocol):
    def __call__(
        self, answer: str, truth: str, *, answer_type: AnswerType, options: Sequence[str]
    ) -> Metrics: ...


@dataclass(frozen=True, kw_only=True)
class Scorer:
    """One rule.

    Args:
        name: as `--scorer` takes it and `scores.json` has it.
        version: raised whenever the rule gives another number for any answer.
        score: `(answer, truth, answer_type=, options=)` → the metrics that apply, each in 0..1.
        summary: one line for tables.
    """

    name: str
    version: str
    score: ScoreFunction
    summary: str


SCORERS: dict[str, Scorer] = {}


def register_scorer(scorer: Scorer) -> None:
    """Add a rule, for `--scorer NAME`, recipes and `score`.

    Raises:
        ValueError: another rule has the name.
    """
    if SCORERS.get(scorer.name, scorer) != scorer:
        raise ValueError(f"The scorer name {scorer.name!r} is taken; choose another name.")
    SCORERS[scorer.name] = scorer


def find_scorers(names: Sequence[str] = ()) -> list[Scorer]:
    """The rules of these names, in this order; all of them if no name is given.

    Raises:
        ValueError: a name that is not known; the nearest known one is suggested.
    """
    load_plugins(PLUGIN_GROUP)
    for name in names:
        if name not in SCORERS:
            raise unknown_name("scorer", name, SCORERS)
    return [SCORERS[name] for name in dict.fromkeys(names)] if names else list(SCORERS.values())
