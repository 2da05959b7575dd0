"""The settings of an experiment, typed and frozen: `Experiment` and its evaluation."""

import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from typing import Annotated

from pydantic import Field

from moellava.eval.settings import EvaluationSettings
from moellava.eval.statistics import NUM_RESAMPLES

Positive = Annotated[int, Field(gt=0)]
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")


@dataclass(frozen=True, kw_only=True)
class EvaluationOptions:
    """What every trained model is asked, and how its answers are scored; as for `moellava eval`."""

    data: str  # a file, a folder or a hub id
    split: str | None = None
    images: str | None = None
    language: str | None = None
    train: str | None = None  # the training split, for the most frequent answers
    prompt: str = "none"
    max_new_tokens: Positive = 64
    limit: Positive | None = None  # the first questions alone
    batch_size: Positive = 8
    device: str | None = None
    dtype: str | None = None
    scorers: tuple[str, ...] = ()  # all if empty
    baselines: tuple[str, ...] = ()
    num_resamples: Positive = NUM_RESAMPLES
    # What the table, the picture and the cards show, as scorer.metric; `results.json` has them all.
    metrics: tuple[str, ...] = ("strict.accuracy",)

    def settings(self, *, progress: bool = False) -> EvaluationSettings:
        """The part that `moellava.eval.evaluate` takes as its settings."""
        own = {item.name for item in fields(EvaluationSettings)}
        given = {name: value for name, value in asdict(self).items() if name in own}
        return EvaluationSettings(**given, progress=progress)

    def __post_init__(self) -> None:
        self.settings()  # unknown scorers, baselines and prompts are errors
        if not self.metrics:
            raise ValueError("evaluation.metrics is empty; name one, such as strict.accuracy.")


@dataclass(frozen=True, kw_only=True)
class Experiment:
    """Variants of a training, each over several seeds, all evaluated on the same questions.

    `stages` are recipes in order: each a mapping with the keys of a recipe and, if wanted, `recipe`
    (a packaged one or a file, whose keys these change) and `name` (by default the stage's own).
    `common` holds keys for every stage that uses them. A variant holds keys for every stage that
    uses them, or for one stage under `stages: {NAME: ...}`; its `moe: false` leaves the model
    dense. The experiment itself sets `output_dir`, `seed` and, but for the first stage,
    `start_from`. Every other variant is compared with the first.
    """

    output_dir: str | None = None  # required
    name: str = "experiment"
    seeds: tuple[Annotated[int, Field(ge=0)], ...] = (0,)
    common: Mapping[str, object] = field(default_factory=dict)
    stages: tuple[Mapping[str, object], ...]
    variants: Mapping[str, Mapping[str, object]] = field(default_factory=lambda: {"model": {}})
    evaluation: EvaluationOptions

    def __post_init__(self) -> None:
        if not self.stages:
            raise ValueError(
                "The experiment has no stages. Add one, such as {recipe: stage2_tune}."
            )
        if not self.variants:
            raise ValueError("variants is empty. Leave it out, or name one, such as dense: {}.")
        if not self.seeds or len(set(self.seeds)) < len(self.seeds):
            raise ValueError(f"seeds is {list(self.seeds)}; expected different whole numbers.")
        for name in self.variants:
            if not _NAME.fullmatch(name):
                raise ValueError(
                    f"The variant {name!r} cannot name a folder. Use letters, digits, '-', '_' "
                    "and '.'."
                )
