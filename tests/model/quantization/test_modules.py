"""Linear layers and experts with rounded weights, against the modules that they replaced."""

import copy

import pytest
import torch
from torch import nn

from moellava.model.language_model import layers_with_differing_experts
from moellava.model.language_model.moe import LlamaMoeExperts, eager_experts_forward
from moellava.model.quantization import num_weights, quantized_weights, weight_bytes, weight_dtypes
from moellava.model.quantization.modules import QuantizedExperts, QuantizedLinear
from moellava.model.quantization.rounding import Scheme
from moellava.model.quantization.weight import QuantizedWeight
from tests.model.quantization.conftest import small_config

SCHEMES = [Scheme(bits=8), Scheme(bits=4, group_size=64)]


@pytest.fixture
def experts():
    torch.manual_seed(0)
    experts = LlamaMoeExperts(small_config())
    for parameter in experts.parameters():
        nn.init.normal_(parameter, std=0.1)
    return experts


def rounded(experts, scheme):
    held = {
        name: QuantizedWeight.of(weight.detach(), scheme)
        for name, weight in experts.named_parameters()
    }
    return QuantizedExperts(experts, **held)


@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
@pytest.mark.parametrize("num_tokens", [1, 6])
def test_experts_are_those_of_the_dequantised_weights(experts, scheme, num_tokens):
    found = rounded(experts, scheme)
    tokens, weights = torch.randn(num_tokens, 128), torch.rand(num_tokens, 2)
    chosen = torch.stack([torch.randperm(4)[:2] for _ in range(num_tokens)])
    output = found(tokens, chosen, weights)
    dense = copy.deepcopy(found).dequantized(torch.float32)
    assert isinstance(dense, LlamaMoeExperts)
    expected = eager_experts_forward(dense, tokens, chosen, weights)
    torch.testing.assert_close(output, expected, rtol=1e-5, atol=1e-5)
    chosen[0, 0] = 4  # on another rank
    torch.testing.assert_close(
        found(tokens, chosen, weights),
        eager_experts_forward(dense, tokens, chosen, weights),
        rtol=1e-5,
        atol=1e-5,
    )


def test_experts_in_bfloat16_are_packed_and_have_gradients(experts):
    found = rounded(experts.bfloat16(), SCHEMES[1])
    tokens = torch.randn(5, 128).bfloat16().requires_grad_()
    chosen, weights = torch.tensor([[0, 1]] * 5), torch.rand(5, 2, requires_grad=True)
    found(tokens, chosen, weights).float().square().sum().backward()
    assert found.gate_up_proj.is_packed
    dense = copy.deepcopy(found).dequantized(torch.float32)
    exact = tokens.detach().float().requires_grad_(), weights.detach().clone().requires_grad_()
    eager_experts_forward(dense, exact[0], chosen, exact[1]).square().sum().backward()
    for given, wanted in ((tokens, exact[0]), (weights, exact[1])):
        assert (given.grad.float() - wanted.grad).norm() < 2e-2 * wanted.grad.norm()


@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
@pytest.mark.parametrize("bias", [True, False])
def test_a_linear_layer_is_that_of_the_dequantised_weight(scheme, bias):
    torch.manual_seed(0)
    linear = nn.Linear(128, 64, bias=bias)
    found = QuantizedLinear(linear, QuantizedWeight.of(linear.weight.detach(), scheme))
    inputs = torch.randn(2, 3, 128)
    output = found(inputs)
    dense = found.dequantized(torch.float32)
    assert type(dense) is nn.Linear
    torch.testing.assert_close(output, dense(inputs), rtol=1e-5, atol=1e-5)


def test_what_needs_ordinary_weights_says_so(plain, quantized):
    layers_with_differing_experts(plain)
    with pytest.raises(ValueError, match=r"experts needs ordinary weights.*dequantize"):
        layers_with_differing_experts(quantized)


def test_numbers_bytes_and_dtypes_are_those_of_the_weights(plain, quantized, config):
    assert num_weights(quantized) == plain.num_parameters()
    assert weight_dtypes(quantized) == {f"int{config.bits}", "bfloat16", "float32"}
    assert weight_dtypes(plain) == {"bfloat16", "float32"}
    # per weight one byte and two per row, or half a byte and four per group
    saved = sum(
        weight.numel() * (1 if config.bits == 8 else 1.5)
        - (2 * weight.numel() // weight.shape[-1] if config.bits == 8 else weight.numel() / 16)
        for _, weight in quantized_weights(quantized)
    )
    assert weight_bytes(plain) - weight_bytes(quantized) == saved
    assert weight_bytes(plain) == sum(p.numel() * p.element_size() for p in plain.parameters())
