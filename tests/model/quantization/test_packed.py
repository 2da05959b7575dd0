"""torch's packed products, against the same product in float32."""

import pytest
import torch

from moellava.model.quantization import packed
from moellava.model.quantization.packed import (
    PackedForm,
    has_int8_product,
    int4_product,
    int8_product,
    join_columns,
    multiplied_as,
    packed_form,
    split_columns,
)


@pytest.fixture
def numbers():
    """(128, 96) of 0 to 15."""
    return torch.randint(16, (128, 96), generator=torch.Generator().manual_seed(0)).to(torch.uint8)


def test_columns_join_and_split(numbers):
    joined = join_columns(numbers)
    assert joined[0, 0] == numbers[0, 0] + 16 * numbers[0, 1]
    assert torch.equal(split_columns(joined), numbers)


def test_this_torch_has_both_products():
    assert packed_form() is not None
    assert has_int8_product()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_the_int4_product_is_that_of_the_numbers(numbers, dtype):
    generator = torch.Generator().manual_seed(1)
    inputs = torch.randn(5, 96, generator=generator).to(dtype)
    pairs = torch.randn(3, 128, 2, generator=generator).to(dtype)
    found = int4_product(inputs, packed_form().pack(join_columns(numbers)), pairs)
    scales, zeros = pairs.float().transpose(0, 1).repeat_interleave(32, 1).unbind(-1)
    expected = inputs.float() @ ((numbers.float() - 8) * scales + zeros).t()
    error = (found.float() - expected).norm() / expected.norm()
    assert error < (4e-3 if dtype == torch.bfloat16 else 1e-6)


def test_packing_is_undone(numbers):
    form, values = packed_form(), join_columns(numbers)
    assert torch.equal(form.unpack(form.pack(values)), values)
    assert form.unpack(form.pack(values)).is_contiguous()
    assert torch.equal(form.columns(form.pack(values), torch.float32), numbers.t().float())


def test_many_rows_are_packed_in_parts():
    values = torch.randint(256, (2 * packed.CHUNK + 64, 16), dtype=torch.uint8)
    whole = torch.ops.aten._convert_weight_to_int4pack_for_cpu(split_columns(values).int(), 2)
    assert torch.equal(packed_form().pack(values), whole)


def test_another_order_is_not_taken_for_this_one(numbers):
    form, values = packed_form(), join_columns(numbers)
    other = PackedForm(form.block, not form.is_halved)
    assert not torch.equal(other.unpack(form.pack(values)), values)


def test_a_torch_without_the_product_has_no_form(monkeypatch):
    def missing(*args):
        raise RuntimeError("not here")

    monkeypatch.setattr(PackedForm, "pack", missing)
    assert packed_form.__wrapped__() is None


def test_a_product_of_another_meaning_is_no_product(monkeypatch):
    monkeypatch.setattr(packed, "int4_product", lambda inputs, *_: torch.zeros(len(inputs), 128))
    assert packed_form.__wrapped__() is None
    monkeypatch.setattr(packed, "int8_product", lambda inputs, *_: torch.zeros(len(inputs), 4))
    assert not has_int8_product.__wrapped__()


def test_the_int8_product_is_that_of_the_numbers():
    generator = torch.Generator().manual_seed(2)
    values = torch.randint(-127, 128, (48, 96), generator=generator).to(torch.int8)
    inputs, scales = torch.randn(5, 96, generator=generator), torch.rand(48, generator=generator)
    inputs, scales = inputs.bfloat16(), scales.bfloat16()
    expected = inputs.float() @ (values * scales.float()[:, None]).t()
    error = (int8_product(inputs, values, scales).float() - expected).norm() / expected.norm()
    assert error < 4e-3


def test_a_cpu_that_emulates_bfloat16_multiplies_in_float32(monkeypatch):
    cpu = torch.device("cpu")
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX2")
    assert multiplied_as(torch.bfloat16, cpu) == torch.float32
    assert multiplied_as(torch.bfloat16, torch.device("cuda")) == torch.bfloat16
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX512")
    assert multiplied_as(torch.bfloat16, cpu) == torch.bfloat16
