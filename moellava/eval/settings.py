"""How a model is evaluated: `EvaluationSettings`, checked where they are made."""

from collections.abc import Sequence
from dataclasses import dataclass

from moellava.eval.baselines import ALL_BASELINES
from moellava.eval.prompts import find_prompt
from moellava.eval.scorers import find_scorers
from moellava.eval.statistics import NUM_RESAMPLES
from moellava.messages import unknown_name


@dataclass(frozen=True, kw_only=True)
class EvaluationSettings:
    """How a model is asked and its answers are scored.

    Args:
        prompt: a name of `moellava.eval.prompts.PROMPTS`, or a free text.
        limit: how many questions; all if left out.
        batch_size, device, dtype: of the model; in float32 none of them changes an answer. A GPU is
            used if there is one and no device is given.
        scorers: names of `SCORERS`; all if empty.
        group_by: fields of the rows; by default those that are known, such as modality.
        baselines: names of `ALL_BASELINES`.
        num_resamples: of the intervals.
        progress: whether to show a bar.
    """

    prompt: str = "none"
    max_new_tokens: int = 64
    limit: int | None = None
    batch_size: int = 8
    device: str | None = None
    dtype: str | None = None
    scorers: Sequence[str] = ()
    group_by: Sequence[str] | None = None
    baselines: Sequence[str] = ()
    num_resamples: int = NUM_RESAMPLES
    progress: bool = False

    def __post_init__(self) -> None:
        for name in ("max_new_tokens", "batch_size", "num_resamples", "limit"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} is {value}; expected 1 or more.")
        for name in self.baselines:
            if name not in ALL_BASELINES:
                raise unknown_name("baseline", name, ALL_BASELINES)
        find_scorers(self.scorers)
        find_prompt(self.prompt)
