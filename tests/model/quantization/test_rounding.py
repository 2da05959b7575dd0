"""Weights to whole numbers and back, against the same arithmetic in numpy."""

import numpy as np
import pytest
import torch

from moellava.model.quantization.rounding import Rounded, Scheme, restored, round_weight

SCHEMES = [Scheme(bits=8), *(Scheme(bits=4, group_size=size) for size in (32, 64, 128))]


@pytest.fixture
def weight():
    return torch.randn(3, 48, 256, generator=torch.Generator().manual_seed(0)) * 0.02


def numpy_restored(rounded):
    """The weight that a file's numbers stand for, as the docstring of `Rounded` says."""
    values, scales = rounded.values.numpy(), rounded.scales.float().numpy()
    if rounded.zeros is None:
        return values * scales[..., None]
    numbers = np.stack([values % 16, values // 16], -1).reshape(*values.shape[:-1], -1)
    size = numbers.shape[-1] // scales.shape[-1]
    zeros = rounded.zeros.float().numpy().repeat(size, -1)
    return (numbers.astype(np.float32) - 8) * scales.repeat(size, -1) + zeros


@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
def test_the_numbers_stand_for_what_the_format_says(weight, scheme):
    rounded = round_weight(weight, scheme)
    values, scales = scheme.shapes(tuple(weight.shape))
    assert (rounded.values.shape, rounded.scales.shape) == (values, scales)
    found = restored(rounded, torch.float32)
    np.testing.assert_allclose(found.numpy(), numpy_restored(rounded), rtol=0, atol=1e-7)


@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
def test_no_weight_is_off_by_more_than_half_a_step(weight, scheme):
    rounded = round_weight(weight, scheme)
    repeats = weight.shape[-1] // (1 if scheme.bits == 8 else rounded.scales.shape[-1])
    scales = rounded.scales[..., None] if scheme.bits == 8 else rounded.scales
    steps = scales.repeat_interleave(repeats, -1)
    off = (restored(rounded, torch.float32) - weight).abs() / steps
    assert off.max() < 0.501
    assert off.mean() > 0.2  # of a uniform one, 0.25


def test_bfloat16_scales_are_those_that_the_numbers_were_rounded_by(weight):
    """Rounding by a finer scale than the one that is kept would add to the error."""
    for scheme in (Scheme(bits=8), Scheme(bits=4)):
        rounded = round_weight(weight.bfloat16(), scheme)
        assert rounded.scales.dtype == torch.bfloat16
        found = restored(rounded, torch.float32) - weight.bfloat16().float()
        exact = restored(round_weight(weight.bfloat16().float(), scheme), torch.float32)
        assert found.norm() < 1.05 * (exact - weight.bfloat16().float()).norm()


def test_every_byte_can_be_restored():
    values = torch.arange(256, dtype=torch.uint8).view(2, 128)
    rounded = Rounded(values, torch.ones(2, 4), torch.zeros(2, 4))
    assert torch.equal(
        restored(rounded, torch.float32)[:, :2],
        torch.tensor([[-8.0, -8.0], [-8.0, 0.0]]),
    )
    np.testing.assert_array_equal(restored(rounded, torch.float32).numpy(), numpy_restored(rounded))


@pytest.mark.parametrize("scheme", SCHEMES[:2], ids=str)
def test_rows_of_zeros_stay(scheme):
    rounded = round_weight(torch.zeros(4, 64), scheme)
    assert not restored(rounded, torch.float32).any()


def test_other_numbers_are_refused():
    with pytest.raises(ValueError, match=r"bits is 3\. Use 8 or 4"):
        Scheme(bits=3)
    with pytest.raises(ValueError, match=r"group_size is 48\. Use 32, 64 or 128"):
        Scheme(bits=4, group_size=48)


def test_a_width_that_groups_do_not_divide_names_those_that_do():
    scheme = Scheme(bits=4, group_size=128)
    with pytest.raises(ValueError, match=r"q is 576 wide.*128.*Use group_size=32 or 64"):
        scheme.require_width("q", 576)
    with pytest.raises(ValueError, match=r"q is 48 wide.*Use 8 bits"):
        scheme.require_width("q", 48)
    scheme.require_width("q", 2048)
    Scheme(bits=8).require_width("q", 33)
