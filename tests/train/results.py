"""Reading what tests/train/worker.py left."""

import json

from safetensors.torch import load_file


def status_of(runs, name):
    """What became of a run; one that ended otherwise than it should is shown with what it said."""
    return json.loads((runs / "statuses.json").read_text())[name]


def said_by(runs, name):
    return "\n".join(path.read_text() for path in sorted(runs.glob(f"{name}.[01].txt")))


def weights_of(runs, name):
    return load_file(runs / name / "model" / "model.safetensors")


def rows_of(runs, name):
    """For each process, step to rows; of a step that was trained twice, the later."""
    found = []
    for file in sorted(runs.glob(f"{name}.[01].rows")):
        steps = {}
        for pid, step, rows in map(json.loads, file.read_text().splitlines()):
            trained_by, so_far = steps.get(step, (pid, []))
            steps[step] = (pid, [*so_far, rows] if trained_by == pid else [rows])
        found.append({step: rows for step, (_, rows) in steps.items()})
    return found


def losses_of(runs, name):
    log = json.loads((runs / name / "log.json").read_text())
    return [(entry["step"], entry["loss"]) for entry in log if "loss" in entry]
