"""`load_in_8bit` and `load_in_4bit` of the builder: answers, description, saving, refusals."""

import pytest
import torch

from moellava.model.builder_enhanced import describe, load_pretrained_model
from moellava.model.checkpoint.difference import load_trainable, save_trainable
from moellava.model.quantization import (
    MoellavaQuantizationConfig,
    num_weights,
    quantized_weights,
    weight_bytes,
)

OPTIONS = {8: {"load_in_8bit": True}, 4: {"load_in_4bit": True}}


@pytest.fixture(scope="module")
def plain(groupable_parts):
    return load_pretrained_model(groupable_parts, dtype="bfloat16")


@pytest.fixture(scope="module", params=OPTIONS)
def bits(request):
    return request.param


@pytest.fixture(scope="module")
def quantized(groupable_parts, bits):
    return load_pretrained_model(groupable_parts, dtype="bfloat16", **OPTIONS[bits])


def names_of(loaded):
    return {name for name, _ in quantized_weights(loaded.model)}


def test_the_language_models_matrices_and_experts_are_rounded_and_nothing_else(plain, quantized):
    layers = {
        name for name, _ in plain.model.named_parameters() if ".language_model.layers." in name
    }
    assert names_of(quantized) == {
        name for name in layers if name.endswith(("_proj.weight", "_proj"))
    }
    assert any(name.endswith("experts.down_proj") for name in names_of(quantized))
    state = dict(quantized.model.named_parameters())
    assert state["model.language_model.layers.0.mlp.gate.weight"].dtype == torch.float32


def test_answers_and_logits_stay_close(plain, quantized, images, bits):
    inputs = plain.processor(text="<image>\nWhat is this?", images=images[0], return_tensors="pt")
    with torch.no_grad():
        exact, close = (loaded.model(**inputs).logits.float() for loaded in (plain, quantized))
    assert 0 < (close - exact).norm() / exact.norm() < {8: 0.05, 4: 0.3}[bits]
    assert (
        len(quantized.answer(images[:2], ["Why?", "Which organ is shown?"], max_new_tokens=3)) == 2
    )


def test_describe_counts_weights_and_the_bytes_that_are_held(plain, quantized, bits):
    assert weight_bytes(quantized.model) < weight_bytes(plain.model)
    last = describe(quantized.model).splitlines()[5]
    assert last.split()[-1] == f"{weight_bytes(quantized.model) / 2**20:,.1f}"
    assert f"int{bits}" in describe(quantized.model)
    assert num_weights(quantized.model) == plain.model.num_parameters()
    assert f"{plain.model.num_parameters():,}" in last
    assert repr(quantized)


def test_it_is_saved_and_opens_quantised_again(quantized, images, bits, tmp_path):
    answer = quantized.answer(images[0], "Why?", max_new_tokens=6)
    quantized.model.save_pretrained(tmp_path)
    quantized.processor.save_pretrained(tmp_path)
    again = load_pretrained_model(tmp_path)
    assert names_of(again) == names_of(quantized)
    assert again.answer(images[0], "Why?", max_new_tokens=6) == answer
    with pytest.raises(ValueError, match="is quantised already"):
        load_pretrained_model(tmp_path, **OPTIONS[bits])


def test_a_saved_model_and_a_difference_open_quantised(
    plain, quantized, groupable_parts, images, bits, tmp_path
):
    plain.model.save_pretrained(tmp_path / "whole")
    plain.processor.save_pretrained(tmp_path / "whole")
    save_trainable(plain, tmp_path / "difference")
    answer = quantized.answer(images[0], "Why?", max_new_tokens=6)
    whole = load_pretrained_model(tmp_path / "whole", **OPTIONS[bits])
    options = {"quantization_config": MoellavaQuantizationConfig(bits=bits)}
    difference = load_trainable(tmp_path / "difference", base=groupable_parts, **options)
    for loaded in (whole, difference):
        assert names_of(loaded) == names_of(quantized)
        assert loaded.answer(images[0], "Why?", max_new_tokens=6) == answer


def test_a_quantised_model_is_no_difference_from_its_base(quantized, tmp_path):
    with pytest.raises(ValueError, match="weights are quantised"):
        save_trainable(quantized, tmp_path)


def test_both_at_once_are_refused(groupable_parts):
    with pytest.raises(ValueError, match="load_in_8bit and load_in_4bit are both given"):
        load_pretrained_model(groupable_parts, load_in_8bit=True, load_in_4bit=True)
