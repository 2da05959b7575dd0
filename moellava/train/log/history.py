"""The stages that made a model, kept beside its weights: `read_history`, `write_history`."""

import json
from pathlib import Path
from typing import Any

import moellava

HISTORY_FILE = "training.json"  # in a model's folder


def read_history(model_folder: str | Path | None) -> list[dict[str, Any]]:
    """First to last; empty where `moellava train` did not make the model, or there is no such folder."""
    file = Path(model_folder or "") / HISTORY_FILE
    history: list[dict[str, Any]] = json.loads(file.read_text())["stages"] if file.is_file() else []
    return history


def write_history(model_folder: Path, start: str | Path | None, **entry: Any) -> None:
    """Record a stage behind those of the model that it started from: names and numbers, no path of this machine."""
    stages = [*read_history(start), {**entry, "moellava": moellava.__version__}]
    (model_folder / HISTORY_FILE).write_text(json.dumps({"stages": stages}, indent=1) + "\n")
