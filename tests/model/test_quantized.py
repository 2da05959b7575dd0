"""`load_in_8bit` of the builder: what is int8, how far the logits move, that it is saved and opens
again.
"""

import pytest
import torch

from moellava.model.builder_enhanced import describe, load_pretrained_model
from moellava.model.checkpoint.difference import load_trainable, save_trainable
from moellava.model.language_model.quantization import is_quantized, weight_bytes

pytest.importorskip("torchao")


@pytest.fixture(scope="module")
def plain(parts):
    return load_pretrained_model(parts)


@pytest.fixture(scope="module")
def quantized(parts):
    return load_pretrained_model(parts, load_in_8bit=True)


def quantized_names(model):
    return {name for name, weight in model.named_parameters() if is_quantized(weight)}


def test_the_language_models_matrices_and_experts_are_int8_and_nothing_else(quantized):
    names = quantized_names(quantized.model)
    layers = {
        name for name, _ in quantized.model.named_parameters() if ".language_model.layers." in name
    }
    assert names == {name for name in layers if name.endswith(("_proj.weight", "_proj"))}
    assert any(name.endswith("experts.down_proj") for name in names)
    state = dict(quantized.model.named_parameters())
    assert state["model.language_model.layers.0.mlp.gate.weight"].dtype == torch.float32


def test_answers_and_logits_stay_close(plain, quantized, images):
    inputs = plain.processor(text="<image>\nWhat is this?", images=images[0], return_tensors="pt")
    with torch.no_grad():
        exact, close = (loaded.model(**inputs).logits.float() for loaded in (plain, quantized))
    assert 0 < (close - exact).norm() / exact.norm() < 0.05
    assert (
        len(quantized.answer(images[:2], ["Why?", "Which organ is shown?"], max_new_tokens=3)) == 2
    )


def test_describe_counts_the_bytes_that_are_held(plain, quantized):
    assert weight_bytes(quantized.model) < weight_bytes(plain.model)
    last = describe(quantized.model).splitlines()[5]
    assert last.split()[-1] == f"{weight_bytes(quantized.model) / 2**20:,.1f}"
    assert "int8" in describe(quantized.model)


def test_it_is_saved_and_opens_quantised_again(quantized, images, tmp_path):
    answer = quantized.answer(images[0], "Why?", max_new_tokens=6)
    quantized.model.save_pretrained(tmp_path)
    quantized.processor.save_pretrained(tmp_path)
    again = load_pretrained_model(tmp_path)
    assert quantized_names(again.model) == quantized_names(quantized.model)
    assert again.answer(images[0], "Why?", max_new_tokens=6) == answer


def test_a_saved_model_and_a_difference_open_quantised(plain, quantized, parts, images, tmp_path):
    plain.model.save_pretrained(tmp_path / "whole")
    plain.processor.save_pretrained(tmp_path / "whole")
    save_trainable(plain, tmp_path / "difference")
    answer = quantized.answer(images[0], "Why?", max_new_tokens=6)
    whole = load_pretrained_model(tmp_path / "whole", load_in_8bit=True)
    options = {"quantization_config": whole.model.hf_quantizer.quantization_config}
    difference = load_trainable(tmp_path / "difference", base=parts, **options)
    for loaded in (whole, difference):
        assert quantized_names(loaded.model) == quantized_names(quantized.model)
        assert loaded.answer(images[0], "Why?", max_new_tokens=6) == answer


def test_a_quantised_model_is_no_difference_from_its_base(quantized, tmp_path):
    with pytest.raises(ValueError, match="weights are quantised"):
        save_trainable(quantized, tmp_path)


def test_four_bits_are_refused_with_the_reason(parts):
    with pytest.raises(ValueError, match=r"bits is 4, but only 8 is supported.*fused experts"):
        load_pretrained_model(parts, load_in_4bit=True)
