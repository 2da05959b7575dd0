"""Two models with equal weights, one of which lies at an odd place of memory."""

import pytest
import torch
from torch import nn

from moellava.model.language_model import LlamaMoeConfig, LlamaMoeForCausalLM
from moellava.testing import in_fresh_memory


def moved(weight: torch.Tensor, offset: int) -> torch.Tensor:
    """The same values, `offset` bytes past a multiple of 64."""
    raw = torch.empty(weight.numel() * weight.element_size() + 128, dtype=torch.uint8)
    start = -raw.data_ptr() % 64 + offset
    place = raw[start : start + weight.numel() * weight.element_size()]
    return place.view(weight.dtype).view(weight.shape).copy_(weight)


@pytest.mark.parametrize("offset", [8, 24, 40])
def test_equal_weights_compute_equal_bits_wherever_they_lay_before(offset):
    ids = torch.randint(1, 99, (2, 9), generator=torch.Generator().manual_seed(1))
    for seed in range(4):
        torch.manual_seed(seed)
        config = LlamaMoeConfig(
            vocab_size=99,
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=4,
            num_attention_heads=4,
            initializer_range=0.2,
        )
        model = LlamaMoeForCausalLM(config).eval()
        with torch.no_grad():
            expected = model(ids).logits
            for weight in model.parameters():
                weight.data = moved(weight.data, offset)
            torch.testing.assert_close(model(ids).logits, expected, rtol=1e-6, atol=5e-6)
            assert torch.equal(in_fresh_memory(model)(ids).logits, expected)


def test_tied_weights_stay_tied_and_other_weights_are_seen():
    model = nn.ModuleDict({"a": nn.Linear(3, 3), "b": nn.Linear(3, 3)})
    model["b"].weight = model["a"].weight
    before = model["a"].weight.data_ptr()
    in_fresh_memory(model)
    assert model["a"].weight is model["b"].weight
    assert model["a"].weight.data_ptr() != before
