"""The three stages in sequence on real images, and what held-out accuracy does."""

import pytest

from tests.train.three_stages import run_three_stages


@pytest.mark.slow(seconds=90)
def test_stages_beat_the_untrained_model_and_the_last_one_blank_images(tmp_path, no_network):
    """Half as long as the runs of docs/training.md, and a quarter of their margins.

    How much each single stage gains depends on rounding, so on the machine.
    """
    seen = run_three_stages(tmp_path, seed=0, num_held_out_crops=12, share=0.5)
    untrained, _, tuned, mixture = seen.accuracies
    print(seen)
    assert untrained + 0.10 < tuned
    assert untrained + 0.15 < mixture
    assert seen.blank + 0.08 < mixture
