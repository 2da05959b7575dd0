"""A YAML file and `key=value` words → a checked `Recipe`: `load_recipe`, `recipe_names`."""

from collections.abc import Hashable, Iterable, Mapping
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import yaml

from moellava.messages import unknown_name
from moellava.model.language_model import LlamaMoeConfig
from moellava.model.language_model.upcycling import MOE_OPTIONS
from moellava.settings import convert, from_mapping
from moellava.storage.errors import reading
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
    for override in overrides:
        name, equals, text = override.partition("=")
        if not equals:
            raise ValueError(
                f"{override!r} is not a setting. Type key=value, such as optim.learning_rate=1e-4."
            )
        try:
            value = yaml.load(text, _Loader)
        except yaml.YAMLError as error:
            raise ValueError(f"{name}={text} is not valid YAML: {error}") from error
        _set(settings, name, value)
    if "stage" not in settings:
        where = "" if isinstance(source, Mapping) else f" {source}"
        raise ValueError(f"The recipe{where} has no stage. Choose one of {', '.join(STAGES)}.")
    recipe = from_mapping(Recipe, settings, kind=_KIND, meanings=MEANINGS)
    _require_used(recipe)
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
    settings = _read(source)
    if "stage" in settings:
        with reading(Path(source).expanduser(), "a recipe"):
            stage_of(from_mapping(Recipe, settings, kind=_KIND, meanings=MEANINGS))
    return settings


def _read(source: str | Path) -> dict[str, object]:
    path = Path(source).expanduser()
    if not path.is_file() and str(source) in recipe_names():
        path = FOLDER / f"{source}.yaml"
    if not path.is_file():
        near = str(unknown_name("recipe", str(source), recipe_names()))
        raise FileNotFoundError(
            f"There is no recipe file {str(source)!r}, and no packaged one. {near}"
        )
    with reading(path, "YAML"):
        settings = yaml.load(path.read_text(encoding="utf-8"), _Loader)
    if not isinstance(settings, dict):
        raise ValueError(
            f"{path} holds a {type(settings).__name__}; expected keys such as stage and data."
        )
    return settings


class _Loader(yaml.SafeLoader):  # type: ignore[misc]  # yaml has no types
    """Refuses a key that stands twice: YAML would keep the last one without a word."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        names = [key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode)]
        for name in names:
            if names.count(name) > 1:
                raise yaml.constructor.ConstructorError(
                    None, None, f"the key {name!r} stands twice; join them", node.start_mark
                )
        mapping: dict[Hashable, Any] = super().construct_mapping(node, deep)
        return mapping


def _set(settings: dict[str, object], name: str, value: object) -> None:
    section, dot, rest = name.partition(".")
    if not dot:
        settings[name] = value
        return
    old = settings.get(section)
    inner = dict(old) if isinstance(old, Mapping) else {}
    _set(inner, rest, value)
    settings[section] = inner
