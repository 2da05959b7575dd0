"""The folder of a run: its path, what its files are called, and the recipe that began it.

| name | what it does |
|---|---|
| `run_folder` | `output_dir` as a path |
| `require_same_recipe` | a run resumes only with the recipe that began it |
| `begin_run`, `read_log`, `write_log` | write `recipe.yaml`; read and write `log.json` |
"""

import json
from pathlib import Path

import yaml

from moellava.storage.writing import write_text
from moellava.train.checkpoints import clear_staging
from moellava.train.options import Recipe, recipe_to_dict
from moellava.train.stage import LogEntry

MODEL_FOLDER = "model"  # there once the stage has finished
ADAPTER_FOLDER = "adapter"
RECIPE_FILE = "recipe.yaml"
LOG_FILE = "log.json"
PICTURE_FILE = "training.png"
ROUTER_FILE = "router.safetensors"  # in the model folder of a `router` stage
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
    old = yaml.safe_load((run / RECIPE_FILE).read_text(encoding="utf-8"))
    new = recipe_to_dict(recipe)
    changed = [
        f"{key}: {old.get(key)!r} then, {new.get(key)!r} now"
        for key in {**old, **new}
        if key not in _FREE_KEYS and old.get(key) != new.get(key)
    ]
    if changed:
        raise ValueError(
            f"{run} holds a run of another recipe ({'; '.join(changed)}). Give the same settings "
            "to resume it, or another output_dir."
        )


def begin_run(recipe: Recipe, run: Path) -> None:
    """Create the folder with the recipe in it; what a killed run left half written is deleted."""
    run.mkdir(parents=True, exist_ok=True)
    clear_staging(run)
    write_text(run / RECIPE_FILE, yaml.safe_dump(recipe_to_dict(recipe), sort_keys=False))


def read_log(run: Path) -> list[LogEntry]:
    """The log of a finished run."""
    log: list[LogEntry] = json.loads((run / LOG_FILE).read_text(encoding="utf-8"))
    return log


def write_log(log: list[LogEntry], run: Path) -> None:
    """Write `log.json`."""
    write_text(run / LOG_FILE, json.dumps(log, indent=1) + "\n")
