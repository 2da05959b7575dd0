"""A run that is killed with SIGKILL, at any moment, ends as one that was not."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from safetensors.torch import load_file

ROOT = Path(__file__).parents[2]
WORKER = Path(__file__).with_name("kill_worker.py")


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs")
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}  # threads do not outlive a fork
    done = subprocess.run(
        [sys.executable, str(WORKER), str(folder)], capture_output=True, text=True, env=environment, timeout=300
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return folder


MOMENTS = [
    "before the first checkpoint", "in a step of the first epoch", "in a step of the second epoch",
    "while a checkpoint is written", "before a checkpoint is moved", "after a checkpoint is moved",
    "while an old checkpoint is deleted", "while the model is written", "before the model is moved",
]  # fmt: skip


def rows_of(runs, name):
    """Step to rows; of a step that was trained twice, the later."""
    lines = (runs / f"{name}.rows.jsonl").read_text().splitlines()
    return dict(json.loads(line) for line in lines)


@pytest.mark.slow
@pytest.mark.parametrize("moment", MOMENTS)
def test_a_run_killed_at_any_moment_ends_with_the_same_weights_and_data_order(runs, moment):
    status = json.loads((runs / "statuses.json").read_text())[moment]
    assert status["killed"] == -9
    assert status["resumed"] == 0
    expected, found = runs / "uninterrupted", runs / moment
    ours, theirs = (load_file(folder / "model" / "model.safetensors") for folder in (found, expected))
    assert ours.keys() == theirs.keys()
    assert all((ours[name] == theirs[name]).all() for name in ours)
    assert rows_of(runs, moment) == rows_of(runs, "uninterrupted")
    log, wanted = (json.loads((folder / "log.json").read_text()) for folder in (found, expected))
    assert [(e["step"], e["loss"]) for e in log if "loss" in e] == [
        (e["step"], e["loss"]) for e in wanted if "loss" in e
    ]


@pytest.mark.slow
def test_what_a_kill_leaves_is_whole_and_what_is_left_over_is_deleted(runs):
    statuses = json.loads((runs / "statuses.json").read_text())
    assert statuses["while a checkpoint is written"]["left"] == ["checkpoint-2"]
    assert statuses["before a checkpoint is moved"]["left"] == ["checkpoint-2"]
    assert statuses["after a checkpoint is moved"]["left"] == ["checkpoint-2", "checkpoint-4"]
    assert statuses["while an old checkpoint is deleted"]["left"] == ["checkpoint-4"]
    for moment in MOMENTS:
        assert not (runs / moment / ".unfinished").exists()
        assert [path.name for path in (runs / moment).glob("checkpoint-*")] == ["checkpoint-8"]
