"""The stages that made a model, kept beside its weights: `read_history`, `write_history`."""

import json
from pathlib import Path

import moellava
from moellava.storage.writing import write_text

HISTORY_FILE = "training.json"  # in a model's folder


def read_history(model_folder: str | Path | None) -> list[dict[str, str | int]]:
    """First to last; empty if `moellava train` did not make the model, or without the folder."""
    file = Path(model_folder or "") / HISTORY_FILE
    history: list[dict[str, str | int]] = (
        json.loads(file.read_text(encoding="utf-8"))["stages"] if file.is_file() else []
    )
    return history


def write_history(model_folder: Path, start: str | Path | None, **entry: str | int) -> None:
    """Record a stage after those of the model that it started from.

    Args:
        entry: names and numbers, no path of this machine.
    """
    stages = [*read_history(start), {**entry, "moellava": moellava.__version__}]
    write_text(model_folder / HISTORY_FILE, json.dumps({"stages": stages}, indent=1) + "\n")
