"""The three stages in sequence on real images, and what held-out accuracy does."""

import pytest

from tests.train.three_stages import run_three_stages


@pytest.mark.slow(seconds=120)
def test_stages_beat_the_untrained_model_and_the_last_one_blank_images(tmp_path, no_network):
    """Margins that six runs of docs/training.md exceed by ten points, three standard errors.

    How much each single stage gains depends on rounding, so on the machine.
    """
    seen = run_three_stages(tmp_path, seed=0)
    untrained, _, tuned, mixture = seen.accuracies
    print(seen)
    assert untrained + 0.10 < tuned
    assert untrained + 0.15 < mixture
    assert seen.blank + 0.12 < mixture
