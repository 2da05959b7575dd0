"""Many images at once, in order."""

import threading

import numpy as np
import pytest
import torch

from moellava.images import as_image_list, map_in_threads
from moellava.images.threads import num_cores


def test_one_image_a_batch_and_nested_lists_become_a_flat_list():
    assert as_image_list("a.png") == ["a.png"]
    assert as_image_list(["a.png", ("b.png", [b"c"])]) == ["a.png", "b.png", b"c"]
    for batch in (np.zeros((3, 4, 5, 3), np.uint8), torch.zeros(3, 3, 4, 5)):
        assert [image.shape for image in as_image_list(batch)] == [batch.shape[1:]] * 3
    assert len(as_image_list(np.zeros((3, 4, 5)))) == 1


def test_results_keep_the_order_of_the_items():
    assert map_in_threads(lambda number: number**2, range(100)) == [n**2 for n in range(100)]
    assert map_in_threads(str, []) == []


@pytest.mark.skipif(num_cores() < 2, reason="one core has one thread")
def test_items_are_worked_on_at_the_same_time():
    both = threading.Barrier(2, timeout=20)
    assert len(map_in_threads(lambda _: both.wait(), range(2))) == 2


def test_an_error_of_one_item_is_raised():
    with pytest.raises(ValueError, match="invalid literal"):
        map_in_threads(int, ["1", "two", "3"])
