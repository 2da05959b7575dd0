"""The order of rows is a function of seed and epoch."""

import pytest

from moellava.train.order import EpochSampler


@pytest.mark.parametrize("is_grouped", [True, False])
def test_the_order_is_a_function_of_seed_and_epoch(is_grouped):
    lengths = [index % 17 for index in range(300)]

    def order(seed, epoch, earlier=()):
        sampler = EpochSampler(
            300, seed=seed, lengths=lengths if is_grouped else None, group_size=4
        )
        for sampler.epoch in (*earlier, epoch):
            found = list(sampler)
        return found

    assert order(0, 2, earlier=(0, 1)) == order(0, 2)
    assert order(0, 1) != order(0, 2)
    assert order(0, 1) != order(1, 1)
    assert sorted(order(0, 1)) == list(range(300))
    spread = [max(part) - min(part) for part in batches([lengths[i] for i in order(0, 1)], 4)]
    assert (sum(spread) / len(spread) < 2) == is_grouped  # shuffled: about 10


def batches(items, size):
    return [items[start : start + size] for start in range(0, len(items), size)]
