"""What a stage of training is: `Stage`, a row of the table in `stages.py`, and `register_stage`.

| name | what it is |
|---|---|
| `Stage` | a row: what the stage starts from, trains, does not look at, and how it plans and runs |
| `register_stage`, `stage_of` | add a row; the row that a recipe names |
| `Plan`, `TrainResult` | what planning and running a stage give |
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moellava.messages import unknown_name
from moellava.plugins import load_plugins
from moellava.train.options import Recipe

LogEntry = dict[str, Any]  # numbers by name; of ours also `load`, `answers`, `moved`


@dataclass(frozen=True)
class TrainResult:
    """What a stage left behind."""

    model_folder: Path
    log: list[LogEntry]  # one entry per logged step or evaluation
    was_finished: bool = False  # nothing was trained: the run had finished before


@dataclass(frozen=True)
class Plan:
    """What a recipe would do, as numbers; `text` is for reading."""

    num_trained: int
    num_parameters: int
    num_rows: int
    num_steps: int
    memory: dict[str, float]  # GiB per device
    flops: float  # of the whole run
    text: str


@dataclass(frozen=True, kw_only=True)
class Stage:
    """One stage of training.

    Args:
        recipe: the packaged recipe that runs it, for messages that ask for this stage.
        after: the stage that must have come before; None starts from the published parts.
        trainable: the parts that it trains unless the recipe says otherwise.
        unused: recipe keys, such as `data.packing`, that do nothing in it and are refused.
        makes_mixture: whether a dense start becomes a mixture of experts, as `moe` says.
        dense_stage: of a stage that makes a mixture, the stage that trains the dense model further
            in its place, where an experiment compares the two.
        gives_router: whether it leaves a router for the next stage, rather than a model.
        run: trains into a run's folder; the bool is whether to show progress.
        plan: counts and estimates without training.
    """

    name: str
    recipe: str
    after: str | None
    trainable: tuple[str, ...]
    unused: tuple[str, ...]
    makes_mixture: bool = False
    dense_stage: str | None = None
    gives_router: bool = False
    run: Callable[[Recipe, Path, bool], TrainResult]
    plan: Callable[[Recipe], Plan]


STAGES: dict[str, Stage] = {}  # filled by `stages.py`


def register_stage(stage: Stage) -> None:
    """Add a stage that recipes can name.

    Raises:
        ValueError: if another stage has that name, or the stage before it is unknown.
    """
    if STAGES.get(stage.name, stage) != stage:
        raise ValueError(f"There is a stage {stage.name!r} already. Choose another name.")
    if stage.after is not None and stage.after not in STAGES:
        raise unknown_name("stage in after:", stage.after, STAGES)
    STAGES[stage.name] = stage


def stage_of(recipe: Recipe) -> Stage:
    """The row of the stage that a recipe names.

    Raises:
        ValueError: if there is none; the nearest is suggested.
    """
    if recipe.stage not in STAGES:
        load_plugins("moellava.stages")
    if recipe.stage not in STAGES:
        raise unknown_name("stage", recipe.stage, STAGES)
    return STAGES[recipe.stage]
