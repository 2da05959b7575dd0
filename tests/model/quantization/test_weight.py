"""One rounded weight: its products against float32, its memory, its state dict."""

import copy

import pytest
import torch

from moellava.model.quantization import weight as weight_module
from moellava.model.quantization.packed import packed_form
from moellava.model.quantization.rounding import Scheme, restored, round_weight
from moellava.model.quantization.weight import PACKED_TOKENS, QuantizedWeight

SCHEMES = [Scheme(bits=8), Scheme(bits=4, group_size=32), Scheme(bits=4, group_size=64)]


@pytest.fixture
def dense():
    """(E, N, K) = (3, 128, 64)."""
    return torch.randn(3, 128, 64, generator=torch.Generator().manual_seed(0)).bfloat16()


def inputs_of(num_tokens, dtype=torch.bfloat16):
    return torch.randn(num_tokens, 64, generator=torch.Generator().manual_seed(1)).to(dtype)


@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
@pytest.mark.parametrize("num_tokens", [1, 5, 300])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_the_product_is_the_dequantised_product_in_float32(dense, scheme, num_tokens, dtype):
    """On both sides of the number of tokens where the way of computing changes."""
    assert 5 < min(PACKED_TOKENS.values()) <= max(PACKED_TOKENS.values()) < 300
    weight, inputs = QuantizedWeight.of(dense.to(dtype), scheme), inputs_of(num_tokens, dtype)
    exact = restored(round_weight(dense.to(dtype), scheme), torch.float32)
    for expert in range(3):
        expected = inputs.float() @ exact[expert].t()
        found = weight.product(inputs, expert)
        assert found.dtype == dtype
        error = (found.float() - expected).norm() / expected.norm()
        assert error < (5e-3 if dtype == torch.bfloat16 else 1e-6)


@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
def test_gradients_are_those_of_the_dequantised_product(dense, scheme):
    weight = QuantizedWeight.of(dense[0].float(), scheme)
    inputs = inputs_of(7, torch.float32).requires_grad_()
    weight.product(inputs).square().sum().backward()
    expected = inputs.detach().clone().requires_grad_()
    (expected @ weight.restored().t()).square().sum().backward()
    torch.testing.assert_close(inputs.grad, expected.grad, rtol=1e-5, atol=1e-3)


def test_packed_memory_is_no_second_copy(dense):
    weight = QuantizedWeight.of(dense, Scheme(bits=4, group_size=32))
    before = {name: tensor.clone() for name, tensor in weight.state_dict().items()}
    held = sum(tensor.nbytes for tensor in weight.buffers())
    weight.pack()
    assert weight.is_packed
    assert sum(tensor.nbytes for tensor in weight.buffers()) == held == dense.numel() * 5 // 8
    assert not torch.equal(weight.values, before["values"])
    for name, tensor in weight.state_dict().items():  # in the order of files
        assert torch.equal(tensor, before[name])
    torch.testing.assert_close(weight.restored(), restored_of(before, dense.dtype), rtol=0, atol=0)
    weight.unpack()
    assert {name: tensor.shape for name, tensor in weight.state_dict().items()} == {
        name: tensor.shape for name, tensor in before.items()
    }
    assert all(torch.equal(getattr(weight, name), tensor) for name, tensor in before.items())


def restored_of(state, dtype):
    return restored((state["values"], state["scales"], state["zeros"]), dtype)


def test_a_state_dict_goes_into_a_packed_weight(dense):
    scheme = Scheme(bits=4, group_size=32)
    source, target = (QuantizedWeight.of(part, scheme) for part in (dense[0], dense[1]))
    source.pack(), target.pack()
    target.load_state_dict(source.state_dict())
    assert torch.equal(target.product(inputs_of(2)), source.product(inputs_of(2)))


def test_a_cast_or_a_copy_keeps_the_weight(dense):
    weight = QuantizedWeight.of(dense[0], Scheme(bits=4, group_size=32))
    weight.pack()
    held = weight.restored(dtype=torch.float32)
    assert torch.equal(copy.deepcopy(weight).restored(dtype=torch.float32), held)
    assert weight.to("cpu").is_packed  # nothing to do
    assert torch.equal(weight.float().restored(), held)
    assert not weight.is_packed
    assert weight.values.dtype == torch.uint8


@pytest.mark.parametrize(
    ("scheme", "inputs", "rows", "words"),
    [
        (SCHEMES[0], torch.ones(1, 64), 128, "float32 on cpu"),
        (SCHEMES[1], torch.ones(1, 64).bfloat16(), 24, "24 rows and 64 columns"),
        (SCHEMES[0], torch.ones(1, 48).bfloat16(), 8, "8 rows and 48 columns"),
    ],
)
def test_unpacking_is_told_once(caplog, scheme, inputs, rows, words):
    weight_module.warn_unpacked.cache_clear()
    weight = QuantizedWeight.of(torch.randn(rows, inputs.shape[1], dtype=inputs.dtype), scheme)
    for _ in range(2):
        found = weight.product(inputs)
    expected = inputs.float() @ weight.restored(dtype=torch.float32).t()
    torch.testing.assert_close(found.float(), expected, rtol=2e-2, atol=5e-2)
    assert caplog.text.count(f"no packed product for {words}") <= 1
    assert words in caplog.text


@pytest.mark.parametrize("bits", [8, 4])
def test_a_torch_without_the_product_unpacks_and_says_so(dense, monkeypatch, caplog, bits):
    weight_module.warn_unpacked.cache_clear()
    weight = QuantizedWeight.of(dense[0], Scheme(bits=bits, group_size=32))
    expected = weight.product(inputs_of(3))
    weight.unpack()
    monkeypatch.setattr(weight_module, "has_int8_product", lambda: False)
    monkeypatch.setattr(weight_module, "packed_form", lambda: None)
    torch.testing.assert_close(weight.product(inputs_of(3)), expected, rtol=2e-2, atol=0.1)
    assert f"no packed product for {bits} bits in this torch" in caplog.text


def test_inside_inference_mode_it_is_packed_for_later_training(dense):
    weight = QuantizedWeight.of(dense[0], Scheme(bits=4, group_size=32))
    with torch.inference_mode():
        weight.product(inputs_of(1))
    assert weight.is_packed == (packed_form() is not None)
    inputs = inputs_of(1).requires_grad_()
    weight.product(inputs).sum().backward()
    assert inputs.grad is not None
