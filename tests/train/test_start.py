"""A stage starts from what it says it starts from."""

import pytest

from moellava.train import train
from tests.train.tiny import tiny_recipe

pytestmark = pytest.mark.usefixtures("quick_runs")


@pytest.mark.parametrize(
    ("stage", "start", "message"),
    [
        ("tune", None, r"Stage 'tune' starts from a finished 'align' stage: set start_from"),
        (
            "experts",
            "align",
            r"'tune', but .* made by stage 'align'. What is missing: moellava train stage2_tune",
        ),
        ("tune", "tune", r"is made by stage 'tune'.*To start from it all the same: after=tune"),
        (
            "experts",
            "nowhere",
            r"is not a folder. Stage 'experts' starts from the output_dir of a finished 'tune'",
        ),
    ],
)
def test_a_stage_from_the_wrong_start_says_what_is_missing(stage, start, message, chain, tiny):
    start_from = None if start is None else str(chain / start)
    recipe = tiny_recipe(tiny, stage, chain / "wrong", start_from=start_from)
    with pytest.raises((ValueError, OSError), match=message):
        train(recipe, show_progress=False)


def test_a_start_that_has_not_finished_says_so(chain, tiny, tmp_path):
    (tmp_path / "checkpoint-4").mkdir()
    with pytest.raises(
        FileNotFoundError, match="only checkpoint-4: that run has not finished; start it again"
    ):
        train(
            tiny_recipe(tiny, "tune", tmp_path / "out", start_from=str(tmp_path)),
            show_progress=False,
        )
