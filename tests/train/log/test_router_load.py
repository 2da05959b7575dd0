"""Loads of experts equal counting by hand."""

import pytest
import torch

from moellava.train.log.router_load import RouterLoad, load_by_name


def test_loads_equal_counting_by_hand():
    generator = torch.Generator().manual_seed(0)
    logits = [torch.randn(6, 3, generator=generator) for _ in range(2)]
    is_image = torch.tensor([[True, True, False], [False, False, False]])
    mask = torch.tensor([[1, 1, 1], [1, 1, 0]])
    load = RouterLoad(top_k=2, layers=[0, 2])
    load.add(logits, is_image, mask)
    load.add(logits[::-1], is_image, mask)
    found = load.flush(lambda tensor: tensor)
    for kind, wanted in (("image", True), ("text", False)):
        for layer in range(2):
            counts = [0, 0, 0]
            for source in (logits[layer], logits[1 - layer]):
                for token in range(6):
                    row, column = divmod(token, 3)
                    if mask[row, column] and bool(is_image[row, column]) == wanted:
                        for expert in sorted(range(3), key=lambda e: -source[token, e])[:2]:
                            counts[expert] += 1
            assert found[kind][layer] == pytest.approx(
                [count / sum(counts) for count in counts], abs=1e-4
            )
    assert found["layers"] == [0, 2]
    assert load_by_name(found)["load_text/layer2_expert1"] == found["text"][1][1]
    assert load.flush(lambda tensor: tensor) is None
