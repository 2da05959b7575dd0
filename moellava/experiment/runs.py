"""An experiment → the trainings that it is made of: `plan_runs` gives a `Run` per variant and seed.

A stage whose recipe, with those before it, is that of an earlier variant is trained once: both runs
name the same folder.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from moellava.experiment.options import Experiment
from moellava.messages import unknown_name
from moellava.train import Recipe, load_recipe
from moellava.train.options import recipe_to_dict
from moellava.train.recipe import read_recipe
from moellava.train.run_folder import MODEL_FOLDER
from moellava.train.stage import STAGES, Stage, stage_of

Settings = dict[str, object]
_OURS = ("output_dir", "seed", "start_from")  # keys that the experiment sets
_NOT_OF_A_RECIPE = ("name", "recipe")


@dataclass(frozen=True)
class StageRun:
    """One stage of a run; `recipe` has its folder and what it starts from."""

    name: str
    recipe: Recipe
    folder: Path

    @property
    def stage(self) -> Stage:
        return stage_of(self.recipe)


@dataclass(frozen=True)
class Run:
    """One variant with one seed.

    Args:
        folder: of the run's own stages, and of its evaluation.
    """

    variant: str
    seed: int
    stages: tuple[StageRun, ...]
    folder: Path

    @property
    def model_folder(self) -> Path:
        """The model of the last stage that gives one."""
        return self._last.folder / MODEL_FOLDER

    @property
    def evaluation_folder(self) -> Path:
        return self.folder / "evaluation"

    @property
    def _last(self) -> StageRun:
        return [stage for stage in self.stages if not stage.stage.gives_router][-1]


def plan_runs(experiment: Experiment) -> list[Run]:
    """The runs, seed by seed, so that an experiment that is stopped early has all variants.

    Raises:
        ValueError: a key that a recipe does not have, a stage that does not follow the one before,
            a variant that is the same as another, or no `output_dir`.
    """
    if not experiment.output_dir:
        raise ValueError("The experiment has no output_dir. Add output_dir=runs/NAME.")
    root = Path(experiment.output_dir).expanduser()
    owners: dict[str, Path] = {}  # the recipes of a chain of stages → the folder of the last
    runs = []
    for seed in experiment.seeds:
        for variant in experiment.variants:
            folder = root / variant / f"seed-{seed}"
            runs.append(
                Run(variant, seed, _stages(experiment, variant, seed, folder, owners), folder)
            )
    _require_different(runs)
    return runs


def _stages(
    experiment: Experiment, variant: str, seed: int, folder: Path, owners: dict[str, Path]
) -> tuple[StageRun, ...]:
    chain: list[StageRun] = []
    key, start, router = "", None, None
    for number, (name, settings) in enumerate(_settings_of_stages(experiment, variant), 1):
        if start is not None:
            settings["start_from"] = str(start)
        recipe = load_recipe({**settings, "seed": seed})
        stage = stage_of(recipe)
        _require_order(recipe, name, chain, experiment.name)
        if router is not None and stage.makes_mixture:
            recipe = replace(recipe, moe=replace(recipe.moe, router=str(router)))
        key += json.dumps(recipe_to_dict(recipe), sort_keys=True)
        own = folder / f"{number}-{name}"
        place = owners.setdefault(key, own)
        chain.append(StageRun(name, replace(recipe, output_dir=str(place)), place))
        start, router = (start, place) if stage.gives_router else (place, router)
    if all(item.stage.gives_router for item in chain):
        raise ValueError(f"{experiment.name}: no stage of variant {variant!r} trains a model.")
    return tuple(chain)


def _settings_of_stages(experiment: Experiment, variant: str) -> list[tuple[str, Settings]]:
    """(name, recipe's settings) of the stages that the variant has."""
    changes = dict(experiment.variants[variant])
    given = changes.pop("stages", {})
    if not isinstance(given, Mapping):
        raise ValueError(f"variants.{variant}.stages is {given!r}; expected stage: {{key: value}}.")
    found: dict[str, Settings] = {}
    for number, own in enumerate(experiment.stages):
        base = read_recipe(str(own["recipe"])) if "recipe" in own else {}
        keys = {key: value for key, value in own.items() if key not in _NOT_OF_A_RECIPE}
        kind = str(keys.get("stage", base.get("stage", "")))
        name = str(own.get("name", kind))
        if not kind or kind not in STAGES:
            stage_of(Recipe(stage=kind))  # raises, with the nearest name
        if name in found:
            raise ValueError(f"Two stages are called {name!r}. Give one of them another name.")
        stage = STAGES[kind]
        where = f"variants.{variant}"
        layers: list[tuple[str, Mapping[str, object]]] = [
            ("common", _used(experiment.common, stage)),
            (f"stages.{name}", keys),
            (where, _used(changes, stage)),
            (f"{where}.stages.{name}", _mapping(given.get(name, {}), f"{where}.stages.{name}")),
        ]
        settings = base
        for place, layer in layers:
            _require_ours_absent(layer, place, is_first=number == 0)
            settings = merged(settings, layer)
        found[name] = settings
    for name in given:
        if name not in found:
            raise unknown_name(f"stage in variants.{variant}.stages:", str(name), found)
    return [(name, dense) for name, one in found.items() if (dense := _dense(one)) is not None]


def merged(settings: Mapping[str, object], changes: Mapping[str, object]) -> Settings:
    """The settings with changes over them, section by section."""
    result = dict(settings)
    for key, value in changes.items():
        old = result.get(key)
        is_section = isinstance(old, Mapping) and isinstance(value, Mapping) and value
        result[key] = merged(old, value) if is_section else value  # type: ignore[arg-type]
    return result


def _used(settings: Mapping[str, object], stage: Stage, prefix: str = "") -> Settings:
    """The keys that do something in the stage."""
    kept: Settings = {}
    for key, value in settings.items():
        if f"{prefix}{key}" in stage.unused:
            continue
        kept[key] = _used(value, stage, f"{prefix}{key}.") if isinstance(value, Mapping) else value
    return kept


def _dense(settings: Settings) -> Settings | None:
    """What `moe: false` makes of a stage; None if the stage has no sense without a mixture."""
    if settings.get("moe") is not False:
        return settings
    stage = STAGES[str(settings["stage"])]
    plain = {key: value for key, value in settings.items() if key != "moe"}
    if stage.gives_router:
        return None
    if not stage.makes_mixture:
        return plain
    parts = plain.get("trainable") or stage.trainable
    listed = [parts] if isinstance(parts, str) else list(parts)  # type: ignore[call-overload]
    mixture_parts = ("experts", "router", "meta_expert")
    dense = ["mlp" if part in mixture_parts else part for part in listed]
    return {
        **plain,
        "stage": stage.dense_stage,
        "after": plain.get("after", stage.after),
        "trainable": list(dict.fromkeys(dense)),
    }


def _mapping(value: object, place: str) -> Mapping[str, object]:
    if not isinstance(value, Mapping):
        raise ValueError(f"{place} is {value!r}; expected recipe keys with their values.")
    return value


def _require_ours_absent(settings: Mapping[str, object], place: str, *, is_first: bool) -> None:
    for key in _OURS:
        if key in settings and not (is_first and key == "start_from"):
            raise ValueError(f"{place} has {key}, which the experiment itself sets. Leave it out.")


def _require_order(recipe: Recipe, name: str, before: list[StageRun], title: str) -> None:
    """Refuse, before anything is trained, a stage that cannot start from the one before it."""
    models = [item for item in before if not item.stage.gives_router]
    needs = recipe.after or stage_of(recipe).after
    if not models or needs in (None, "any", models[-1].recipe.stage):
        return
    raise ValueError(
        f"{title}: stage {name!r} starts from a model of stage {needs!r}, but the stage before it "
        f"is {models[-1].recipe.stage!r}. Put a stage {needs!r} between them, or set after: any."
    )


def _require_different(runs: list[Run]) -> None:
    models: dict[Path, str] = {}
    for run in runs:
        other = models.setdefault(run.model_folder, run.variant)
        if other != run.variant:
            raise ValueError(
                f"The variants {other!r} and {run.variant!r} have the same recipes. Leave one out."
            )
