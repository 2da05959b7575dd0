"""LoRA on a rounded base: one step, saving, reading, merging, and what is refused."""

import pytest
import torch
from peft import IA3Config

from moellava.model.builder_enhanced import load_pretrained_model
from moellava.model.checkpoint.adapter import read_adapter
from moellava.model.quantization import quantized_weights
from moellava.model.quantization.adapters import accept_rounded
from moellava.train.adapters import merge_adapters, with_adapters
from moellava.train.options import Lora
from moellava.train.trainable import set_trainable

LORA = Lora(rank=4, alpha=8, dropout=0.0)


@pytest.fixture(params=[8, 4])
def load(request, groupable_parts):
    def load(moe_config=False):
        return load_pretrained_model(
            groupable_parts,
            moe_config=moe_config,
            dtype="float32",
            load_in_8bit=request.param == 8,
            load_in_4bit=request.param == 4,
        ).model

    return load


def lora_gradients(model):
    return {name: p.grad for name, p in model.named_parameters() if p.requires_grad}


def test_a_dense_model_learns_and_merges(load, tmp_path):
    ids = torch.randint(5, 900, (2, 12), generator=torch.Generator().manual_seed(0))
    model, exact = (
        with_adapters(made, ["language_model"], LORA, seed=0).train()
        for made in (load(), load().dequantize())
    )
    assert len(list(quantized_weights(model))) == 28
    for adapted in (model, exact):
        adapted(input_ids=ids, labels=ids).loss.backward()
    found, expected = lora_gradients(model), lora_gradients(exact)
    assert found.keys() == expected.keys()
    for name, gradient in found.items():
        torch.testing.assert_close(gradient, expected[name], rtol=1e-3, atol=1e-5)
    assert any(gradient.abs().max() > 1e-3 for gradient in found.values())
    torch.optim.SGD(model.parameters(), lr=1.0).step()

    logits = model.eval()(input_ids=ids).logits
    start = load()(input_ids=ids).logits
    assert (start - logits).norm() > 1e-3 * logits.norm()
    model.save_pretrained(tmp_path)
    again = read_adapter(load(), tmp_path).eval()
    torch.testing.assert_close(again(input_ids=ids).logits, logits, rtol=0, atol=1e-6)
    merged = merge_adapters(load(), tmp_path).eval()
    assert not list(quantized_weights(merged))
    torch.testing.assert_close(merged(input_ids=ids).logits, logits, rtol=1e-4, atol=1e-4)


def test_merging_into_rounded_weights_is_refused(load):
    model = with_adapters(load(), ["language_model"], LORA, seed=0)
    with pytest.raises(ValueError, match=r"cannot be merged into rounded weights.*dequantize"):
        model.merge_and_unload()


def test_adapters_of_experts_are_refused(load):
    with pytest.raises(ValueError, match=r"fused experts \(mlp.experts.down_proj"):
        with_adapters(load(moe_config=True), ["experts"], LORA, seed=0)


def test_rounded_weights_do_not_learn_themselves(load):
    set_trainable(load(), ["projector"])
    with pytest.raises(ValueError, match=r"trainable: \['language_model'\] without lora needs"):
        set_trainable(load(), ["language_model"])


def test_other_adapters_are_refused_on_rounded_weights_only(load, groupable_parts):
    config = IA3Config(target_modules=["q_proj"])
    with pytest.raises(ValueError, match=r"are LoRA, not.*IA3"):
        accept_rounded(config, load())
    assert accept_rounded(config, torch.nn.Linear(2, 2)) is config
