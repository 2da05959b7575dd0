"""A YAML file and `key=value` words → a checked `Recipe`: `load_recipe`, `recipe_names`."""

from collections.abc import Iterable, Mapping
from dataclasses import fields, replace
from pathlib import Path

from moellava.eval.scorers import find_scorers
from moellava.messages import unknown_name
from moellava.model.language_model import LlamaMoeConfig
from moellava.model.language_model.upcycling import MOE_OPTIONS
from moellava.settings import convert, from_mapping
from moellava.storage.errors import reading
from moellava.storage.settings_file import override, read_settings
from moellava.train.options import Recipe
from moellava.train.stage import stage_of
from moellava.train.stages import STAGES

FOLDER = Path(__file__).with_name("recipes")
_KIND = "recipe key"
# What words of other trainers are here; errors suggest it.
MEANINGS = {
    "alpha": "lora.alpha",
    "batch": "optim.batch_size",
    "bs": "optim.batch_size",
    "bsz": "optim.batch_size",
    "dataset": "data.train",
    "epoch": "optim.epochs",
    "gradient_checkpointing": "optim.activation_checkpointing",
    "lora_alpha": "lora.alpha",
    "lora_r": "lora.rank",
    "lr": "optim.learning_rate",
    "max_grad": "optim.max_grad_norm",
    "max_len": "data.max_length",
    "model_max_length": "data.max_length",
    "num_epochs": "optim.epochs",
    "num_train_epochs": "optim.epochs",
    "out": "output_dir",
    "output": "output_dir",
    "per_device_train_batch_size": "optim.per_device_batch_size",
    "r": "lora.rank",
    "save_steps": "saving.every",
    "scheduler": "optim.schedule",
    "steps": "optim.max_steps",
    "warmup_ratio": "optim.warmup",
    "wd": "optim.weight_decay",
    "workers": "data.num_workers",
}


def load_recipe(source: str | Path | Mapping[str, object], overrides: Iterable[str] = ()) -> Recipe:
    """Read a recipe.

    Args:
        source: a YAML file, the name of a packaged one (`recipe_names()`), or a mapping.
        overrides: `key=value`, values in YAML; dots go into sections: `optim.learning_rate=1e-4`.

    Raises:
        OSError: if there is no such file or name.
        ValueError: for an unknown key, with the nearest known one; for a value that its key does
            not admit; for a setting that the stage would not look at.
    """
    settings = dict(source) if isinstance(source, Mapping) else _read_checked(source)
    override(settings, overrides)
    if "stage" not in settings:
        where = "" if isinstance(source, Mapping) else f" {source}"
        raise ValueError(f"The recipe{where} has no stage. Choose one of {', '.join(STAGES)}.")
    recipe = from_mapping(Recipe, settings, kind=_KIND, meanings=MEANINGS)
    _require_used(recipe)
    _require_questions(recipe)
    _require_frozen_features(recipe)
    return replace(recipe, moe=replace(recipe.moe, config=_moe_config(recipe.moe.config)))


def recipe_names() -> list[str]:
    """The packaged recipes."""
    return sorted(path.stem for path in FOLDER.glob("*.yaml"))


def _require_used(recipe: Recipe) -> None:
    """A setting that its stage would not look at is a mistake."""
    usual = Recipe(stage=recipe.stage)
    for name in stage_of(recipe).unused:
        if _value_at(recipe, name) != _value_at(usual, name):
            raise ValueError(f"{name} does nothing in stage {recipe.stage!r}. Leave it out.")


def _require_questions(recipe: Recipe) -> None:
    """Scorers have to be known, and to have something to score."""
    scorers = recipe.evaluation.scorers
    if not scorers:
        return
    find_scorers(scorers)
    if recipe.data.evaluation is None:
        raise ValueError(
            f"evaluation.scorers is {', '.join(scorers)}, but there are no held-out rows. "
            "Set data.evaluation=FILE, or leave evaluation.scorers out."
        )


def _require_frozen_features(recipe: Recipe) -> None:
    """Kept features are those of a tower that stays as it is."""
    parts = recipe.trainable or stage_of(recipe).trainable
    if recipe.data.features is not None and "vision_tower" in parts:
        raise ValueError(
            f"data.features is {recipe.data.features!r}, which keeps what a frozen tower gives, "
            "but trainable names 'vision_tower', which would not be run. Leave data.features out "
            "to train the tower, or 'vision_tower' to keep its features."
        )


def _value_at(recipe: Recipe, name: str) -> object:
    value: object = recipe
    for key in name.split("."):
        value = getattr(value, key)
    return value


def _moe_config(settings: Mapping[str, object]) -> dict[str, object]:
    """The mixture's fields in their own types; the rest of the checks is `LlamaMoeConfig`'s."""
    floats = {item.name for item in fields(LlamaMoeConfig) if item.type is float}
    known = [f"moe.config.{option}" for option in MOE_OPTIONS]
    for name in settings:
        if name not in MOE_OPTIONS:
            raise unknown_name(_KIND, f"moe.config.{name}", known)
    return {
        name: convert(float, value, f"moe.config.{name}") if name in floats else value
        for name, value in settings.items()
    }


def _read_checked(source: str | Path) -> dict[str, object]:
    """The settings of a file, whose own mistakes name it; `overrides` may have others."""
    settings = read_recipe(source)
    if "stage" in settings:
        with reading(Path(source).expanduser(), "a recipe"):
            stage_of(from_mapping(Recipe, settings, kind=_KIND, meanings=MEANINGS))
    return settings


def read_recipe(source: str | Path) -> dict[str, object]:
    """The settings of a YAML file or of a packaged recipe, as they stand there."""
    path = Path(source).expanduser()
    if not path.is_file() and str(source) in recipe_names():
        path = FOLDER / f"{source}.yaml"
    if not path.is_file():
        near = str(unknown_name("recipe", str(source), recipe_names()))
        raise FileNotFoundError(
            f"There is no recipe file {str(source)!r}, and no packaged one. {near}"
        )
    return read_settings(path)
