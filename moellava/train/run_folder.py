"""The folder of a run: its path, what its files are called, and the recipe that began it.

| name | what it does |
|---|---|
| `run_folder` | `output_dir` as a path |
| `require_same_recipe` | a run resumes only with the recipe that began it |
| `begin_run`, `read_log`, `write_log` | write `recipe.yaml`; read and write `log.json` |
| `require_log` | an error for what is not a log |
"""

import json
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import yaml

from moellava.storage.errors import reading
from moellava.storage.writing import write_text
from moellava.storage.yaml_text import load_yaml
from moellava.train.checkpoints import clear_staging
from moellava.train.log.router_load import KINDS
from moellava.train.options import Recipe, recipe_to_dict, without_secrets
from moellava.train.stage import LogEntry

MODEL_FOLDER = "model"  # there once the stage has finished
ADAPTER_FOLDER = "adapter"
RECIPE_FILE = "recipe.yaml"
LOG_FILE = "log.json"
PICTURE_FILE = "training.png"
# Entries of the log that are not numbers: the load of each expert, answers to held-out questions,
# how far each part moved.
_NESTED_IN_LOG = ("load", "answers", "moved")
# Keys that may change when a run resumes: they do not change the weights.
_FREE_KEYS = ("output_dir", "logging", "saving", "evaluation")


def run_folder(recipe: Recipe) -> Path:
    """`output_dir` as a path; its absence is an error."""
    if not recipe.output_dir:
        raise ValueError("The recipe has no output_dir. Add output_dir=runs/NAME.")
    return Path(recipe.output_dir).expanduser()


def require_same_recipe(recipe: Recipe, run: Path) -> None:
    """Raise `ValueError` if another recipe began the run in this folder."""
    if not (run / RECIPE_FILE).is_file():
        return
    with reading(run / RECIPE_FILE, "a recipe"):
        written = load_yaml((run / RECIPE_FILE).read_text(encoding="utf-8"))
        old = _leaves(without_secrets(written))
    new = _leaves(recipe_to_dict(recipe))
    changed = [
        f"{key}: {old.get(key)!r} then, {new.get(key)!r} now"
        for key in {**old, **new}
        if key.partition(".")[0] not in _FREE_KEYS and old.get(key) != new.get(key)
    ]
    if changed:
        raise ValueError(
            f"{run} holds a run of another recipe ({'; '.join(changed)}). Give the same settings "
            "to resume it, or another output_dir."
        )


def _leaves(settings: object, prefix: str = "") -> dict[str, object]:
    """Nested settings as one mapping with keys such as `optim.learning_rate`."""
    if not isinstance(settings, Mapping):
        raise TypeError(f"a recipe is a mapping, not a {type(settings).__name__}")
    found: dict[str, object] = {}
    for name, value in settings.items():
        if isinstance(value, Mapping) and value:
            found |= _leaves(value, f"{prefix}{name}.")
        else:
            found[f"{prefix}{name}"] = value
    return found


def begin_run(recipe: Recipe, run: Path) -> None:
    """Create the folder with the recipe in it; what a killed run left half written is deleted."""
    run.mkdir(parents=True, exist_ok=True)
    clear_staging(run)
    write_text(run / RECIPE_FILE, yaml.safe_dump(recipe_to_dict(recipe), sort_keys=False))


def read_log(run: Path) -> list[LogEntry]:
    """The log of a finished run."""
    with reading(run / LOG_FILE, "a log"):
        log: list[LogEntry] = json.loads((run / LOG_FILE).read_text(encoding="utf-8"))
        require_log(log)
    return log


def require_log(log: object) -> None:
    """Raise `TypeError` or `ValueError` unless something read from a file is a log of a run."""
    if not isinstance(log, list):
        raise TypeError(f"a log is a list of entries, not a {type(log).__name__}")
    for number, entry in enumerate(log):
        if not isinstance(entry, dict):
            raise TypeError(f"entry {number} of the log is a {type(entry).__name__}")
        for name, value in entry.items():
            if name not in _NESTED_IN_LOG and not isinstance(value, int | float):
                raise TypeError(f"{name} of entry {number} of the log is not a number")
        for kind in KINDS if "load" in entry else ():
            if np.asarray(entry["load"][kind], dtype=float).ndim != 2:
                raise TypeError(f"the load of entry {number} of the log is not a table")


def write_log(log: list[LogEntry], run: Path) -> None:
    """Write `log.json`."""
    write_text(run / LOG_FILE, json.dumps(log, indent=1) + "\n")
