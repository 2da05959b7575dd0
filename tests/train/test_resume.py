"""A run that is killed with SIGKILL, at any moment, ends as one that was not."""

import pytest

from tests.train.results import losses_of, rows_of, said_by, status_of, weights_of

MOMENTS = [
    "before the first checkpoint", "in the first epoch", "at an epoch's end", "in the second epoch",
    "while a checkpoint is written", "before a checkpoint is moved", "after a checkpoint is moved",
    "while an old checkpoint is deleted", "while the model is written", "before the model is moved",
]  # fmt: skip
# With workers, accumulated batches and adapters whose dropout draws random numbers; on two
# processes; sharded.
OTHERS = {
    "adapters at an epoch's end": "adapters",
    "adapters in the second epoch": "adapters",
    "ddp killed": "ddp adapters",
    "fsdp2 killed": "fsdp2 adapters",
    "fsdp2 killed at the end": "fsdp2 adapters",
}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("killed", "whole"), [*((moment, "alone") for moment in MOMENTS), *OTHERS.items()]
)
def test_a_killed_run_ends_with_the_same_weights_losses_and_data_order(runs, killed, whole):
    status = status_of(runs, killed)
    assert (status["killed"], status["ended"]) == (-9, 0), said_by(runs, killed)
    ours, theirs = weights_of(runs, killed), weights_of(runs, whole)
    assert ours.keys() == theirs.keys()
    assert all((ours[name] == theirs[name]).all() for name in ours)
    assert rows_of(runs, killed) == rows_of(runs, whole)
    assert losses_of(runs, killed) == losses_of(runs, whole)


@pytest.mark.slow
def test_the_runs_that_are_compared_saw_every_row_in_another_order_each_epoch(runs):
    """Two steps an epoch of eight rows, in one process and over two."""
    for name in ("alone", "adapters", "ddp adapters"):
        first, second = ([], [])
        for steps in rows_of(runs, name):
            assert len(steps) == 5
            for step, batches in steps.items():
                target = first if step < 2 else second if step < 4 else []
                target += [row for batch in batches for row in batch]
        assert sorted(first) == sorted(second) == sorted(f"row{index}" for index in range(8))
        assert first != second


@pytest.mark.slow
def test_what_a_kill_leaves_is_whole_and_what_is_left_over_is_deleted(runs):
    left = {moment: status_of(runs, moment)["left"] for moment in MOMENTS}
    assert left["before the first checkpoint"] == []
    assert left["while a checkpoint is written"] == ["checkpoint-1"]
    assert left["before a checkpoint is moved"] == ["checkpoint-1"]
    assert left["after a checkpoint is moved"] == ["checkpoint-1", "checkpoint-2"]
    assert left["while an old checkpoint is deleted"] == ["checkpoint-2"]
    for moment in MOMENTS:
        assert not (runs / moment / ".unfinished").exists()
        assert [path.name for path in (runs / moment).glob("checkpoint-*")] == ["checkpoint-5"]
