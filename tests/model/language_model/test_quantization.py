"""8-bit weights: what is quantised, what is not, and how far the logits move."""

import re
import sys

import pytest
import torch

from moellava.model.language_model import (
    LlamaMoeConfig,
    LlamaMoeForCausalLM,
    quantization_config,
    weight_bytes,
)
from moellava.model.language_model.quantization import (
    QUANTIZED_MODULES,
    QUANTIZED_PARAMETERS,
    is_quantized,
)


@pytest.fixture
def mixture_folder(tmp_path):
    torch.manual_seed(0)
    config = LlamaMoeConfig(
        vocab_size=99,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        initializer_range=0.1,
        meta_expert=True,
        pad_token_id=0,
    )
    LlamaMoeForCausalLM(config).to(torch.bfloat16).save_pretrained(tmp_path / "mixture")
    return tmp_path / "mixture"


@pytest.fixture
def plain(mixture_folder):
    return LlamaMoeForCausalLM.from_pretrained(mixture_folder, dtype=torch.bfloat16).eval()


@pytest.fixture
def quantized(mixture_folder):
    pytest.importorskip("torchao")
    return LlamaMoeForCausalLM.from_pretrained(
        mixture_folder, dtype=torch.bfloat16, quantization_config=quantization_config()
    ).eval()


def test_layers_and_experts_are_int8_and_the_router_and_head_are_not(quantized):
    is_int8 = {name: is_quantized(weight) for name, weight in quantized.named_parameters()}
    for name in ("embed_tokens", "layernorm", ".norm.", "mlp.gate.", "lm_head"):
        assert not any(flag for full, flag in is_int8.items() if name in full)
    rest = [full for full, flag in is_int8.items() if not flag]
    assert not [full for full in rest if "_proj" in full]
    assert quantized.model.layers[0].mlp.gate.weight.dtype == torch.float32
    assert quantized.model.layers[0].mlp.experts.down_proj.qdata.dtype == torch.int8


def test_bytes_shrink_to_one_per_weight_and_five_per_row(plain, quantized):
    matrices = [p for name, p in plain.named_parameters() if "_proj" in name]
    # per row: a float32 scale and torchao's int8 zero point
    saved = sum(p.numel() * (2 - 1) - p.numel() // p.shape[-1] * 5 for p in matrices)
    assert weight_bytes(plain) - weight_bytes(quantized) == saved


def test_logits_stay_close(plain, quantized, ids):
    exact = plain(ids).logits.float()
    error = (quantized(ids).logits.float() - exact).norm() / exact.norm()
    assert error < 0.1


def test_quantised_mixture_generates(quantized, ids):
    assert quantized.generate(ids, max_new_tokens=3, pad_token_id=0).shape == (2, 12)


def test_quantised_mixture_comes_back_from_disk(quantized, ids, tmp_path):
    quantized.save_pretrained(tmp_path / "int8")
    loaded = LlamaMoeForCausalLM.from_pretrained(tmp_path / "int8").eval()
    torch.testing.assert_close(loaded(ids).logits, quantized(ids).logits, rtol=1e-6, atol=1e-5)


def test_the_image_side_of_a_multimodal_model_is_not_named():
    def is_named(name):
        patterns = (*QUANTIZED_MODULES, *QUANTIZED_PARAMETERS)
        return any(re.fullmatch(pattern.removeprefix("re:"), name) for pattern in patterns)

    assert is_named("model.language_model.layers.3.mlp.experts.gate_up_proj")
    assert is_named("model.language_model.layers.3.self_attn.q_proj")
    assert not is_named("model.vision_tower.encoder.layers.3.self_attn.q_proj")
    assert not is_named("model.multi_modal_projector.0")


@pytest.mark.parametrize("bits", [4, 2])
def test_other_bits_are_refused(bits):
    with pytest.raises(ValueError, match=f"bits is {bits}, but only 8.*fused experts"):
        quantization_config(bits)


def test_missing_torchao_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "torchao", None)
    monkeypatch.setattr("moellava.model.language_model.quantization.find_spec", lambda name: None)
    with pytest.raises(ImportError, match="pip install torchao"):
        quantization_config()
