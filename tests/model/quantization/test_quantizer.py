"""`from_pretrained` and `save_pretrained` of rounded models: what is rounded, that it comes back,
what it takes.
"""

import json

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from moellava.model.language_model import LlamaMoeForCausalLM
from moellava.model.quantization import (
    MoellavaQuantizationConfig,
    quantized_tensors,
    quantized_weights,
)
from moellava.testing import in_fresh_memory
from tests.model.quantization.conftest import small_config
from tests.processes import printed


def test_layers_and_experts_are_rounded_and_nothing_else(quantized, plain, config):
    names = {name for name, _ in quantized_weights(quantized)}
    assert names == {name for name, _ in plain.named_parameters() if "_proj" in name}
    assert "model.layers.0.mlp.experts.down_proj" in names
    assert "model.layers.0.mlp.meta_expert.up_proj.weight" in names
    rest = {name for name, _ in quantized.named_parameters()}
    assert rest == {name for name, _ in plain.named_parameters()} - names
    assert quantized.model.layers[0].mlp.gate.weight.dtype == torch.float32
    assert all(weight.scheme.bits == config.bits for _, weight in quantized_weights(quantized))


def test_logits_are_those_of_the_dequantised_model(quantized, plain, ids, config):
    logits = quantized(ids).logits.float()
    exact = plain(ids).logits.float()
    assert (logits - exact).norm() < (0.1 if config.bits == 8 else 0.6) * exact.norm()
    dense = quantized.dequantize()
    assert not list(quantized_weights(dense))
    assert not dense.is_quantized
    assert dense.state_dict().keys() == plain.state_dict().keys()
    # routing is left out: a token near a router's decision may go to another expert
    assert (dense(ids).logits.float() - logits).norm() < 0.2 * logits.norm()


@pytest.mark.parametrize("head", [False, True])
def test_a_saved_model_comes_back_bit_for_bit(mixture_folder, config, head, ids, tmp_path):
    asked = MoellavaQuantizationConfig(config.bits, config.group_size, head)
    model = LlamaMoeForCausalLM.from_pretrained(
        mixture_folder, dtype=torch.bfloat16, quantization_config=asked
    ).eval()
    assert ("lm_head.weight" in dict(quantized_weights(model))) == head
    in_fresh_memory(model)
    model.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    in_fresh_memory(again)
    assert isinstance(again, LlamaMoeForCausalLM)
    assert again.config.quantization_config.to_dict() == asked.to_dict()
    assert torch.equal(again(ids).logits, model(ids).logits)
    assert torch.equal(
        again.generate(ids, max_new_tokens=4, pad_token_id=0),
        model.generate(ids, max_new_tokens=4, pad_token_id=0),
    )
    state, kept = model.state_dict(), again.state_dict()
    assert state.keys() == kept.keys()
    assert all(torch.equal(state[name], kept[name]) for name in state)


def test_the_files_names_and_shapes_are_the_documented_ones(quantized, config):
    state = quantized.state_dict()
    name = "model.layers.0.mlp.experts.down_proj"
    shapes = {
        key.removeprefix(name + "."): tuple(value.shape)
        for key, value in state.items()
        if key.startswith(name)
    }
    expected = {
        8: {"values": (4, 128, 256), "scales": (4, 128)},
        4: {"values": (4, 128, 128), "scales": (4, 128, 4), "zeros": (4, 128, 4)},
    }
    assert shapes == expected[config.bits]


def test_tensors_one_by_one_are_those_of_a_saved_model(plain, quantized, config):
    made = dict(quantized_tensors(plain.state_dict().items(), config))
    state = quantized.state_dict()
    assert made.keys() == state.keys()
    assert all(torch.equal(made[name], state[name]) for name in state)


def test_a_dense_llama_is_rounded_too(tmp_path, config, ids):
    torch.manual_seed(0)
    sizes = {
        name: getattr(small_config(), name)
        for name in ("vocab_size", "hidden_size", "intermediate_size", "num_attention_heads")
    }
    llama = LlamaForCausalLM(LlamaConfig(**sizes, num_hidden_layers=2, attention_bias=True))
    llama.save_pretrained(tmp_path / "dense")
    model = LlamaForCausalLM.from_pretrained(tmp_path / "dense", quantization_config=config)
    assert len(list(quantized_weights(model))) == 14
    model.save_pretrained(tmp_path / "rounded")
    again = LlamaForCausalLM.from_pretrained(tmp_path / "rounded")
    assert torch.equal(again(ids).logits, model(ids).logits)


def test_the_group_size_is_the_largest_that_fits(mixture_folder, tmp_path):
    asked = MoellavaQuantizationConfig(bits=4)
    model = LlamaMoeForCausalLM.from_pretrained(mixture_folder, quantization_config=asked)
    assert model.config.quantization_config.group_size == 128
    LlamaMoeForCausalLM(small_config(intermediate_size=192)).save_pretrained(tmp_path)
    model = LlamaMoeForCausalLM.from_pretrained(tmp_path, quantization_config=asked)
    assert model.config.quantization_config.group_size == 64


def test_what_cannot_be_rounded_is_refused(mixture_folder, tmp_path):
    def load(folder, **fields):
        given = MoellavaQuantizationConfig(**fields)
        return LlamaMoeForCausalLM.from_pretrained(folder, quantization_config=given)

    with pytest.raises(ValueError, match=r"bits is 2\. Use 8 or 4"):
        load(mixture_folder, bits=2)
    LlamaMoeForCausalLM(small_config(intermediate_size=192)).save_pretrained(tmp_path / "narrow")
    with pytest.raises(ValueError, match=r"down_proj is 192 wide.*Use group_size=32 or 64"):
        load(tmp_path / "narrow", bits=4, group_size=128)
    LlamaMoeForCausalLM(small_config(tie_word_embeddings=True)).save_pretrained(tmp_path / "tied")
    with pytest.raises(ValueError, match=r"ties it to the embeddings. Leave head out"):
        load(tmp_path / "tied", head=True)


def test_another_architecture_is_refused(tmp_path):
    config = AutoConfig.for_model(
        "gpt2", n_layer=1, n_head=2, n_embd=64, vocab_size=9, n_positions=8
    )
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="GPT2LMHeadModel has no weights that 'moellava' rounds"):
        AutoModelForCausalLM.from_pretrained(
            tmp_path, quantization_config=MoellavaQuantizationConfig()
        )


def test_missing_and_misshapen_weights_are_errors(mixture_folder, tmp_path, config):
    from safetensors.torch import load_file, save_file

    for file in mixture_folder.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    weights = load_file(tmp_path / "model.safetensors")
    name = "model.layers.0.self_attn.q_proj.weight"
    for changed, words in (
        ({name: weights[name][:, :64].contiguous()}, "mismatched keys.*q_proj"),
        ({name: None}, "missing keys.*q_proj"),
    ):
        left = {key: value for key, value in (weights | changed).items() if value is not None}
        save_file(left, tmp_path / "model.safetensors", metadata={"format": "pt"})
        with pytest.raises(ValueError, match=words):
            LlamaMoeForCausalLM.from_pretrained(tmp_path, quantization_config=config)


def test_damaged_files_of_a_rounded_model_are_errors(quantized, tmp_path):
    from safetensors.torch import load_file, save_file

    quantized.save_pretrained(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    name = "model.layers.0.mlp.experts.down_proj.scales"
    for changed, words in (
        ({name: weights[name][:, :64].contiguous()}, "mismatched keys.*down_proj.scales"),
        ({name: None}, "missing keys.*down_proj.scales"),
    ):
        left = {key: value for key, value in (weights | changed).items() if value is not None}
        save_file(left, tmp_path / "model.safetensors", metadata={"format": "pt"})
        with pytest.raises(ValueError, match=words):
            LlamaMoeForCausalLM.from_pretrained(tmp_path)
    settings = json.loads((tmp_path / "config.json").read_text())
    settings["quantization_config"]["bits"] = 5
    (tmp_path / "config.json").write_text(json.dumps(settings))
    with pytest.raises(ValueError, match=r"bits is 5\. Use 8 or 4"):
        LlamaMoeForCausalLM.from_pretrained(tmp_path)


def test_the_image_side_of_a_multimodal_model_stays():
    rounds = MoellavaQuantizationConfig(head=True).rounds
    assert rounds("model.language_model.layers.3.mlp.experts.gate_up_proj")
    assert rounds("model.language_model.layers.3.self_attn.q_proj.weight")
    assert rounds("lm_head.weight")
    assert not rounds("model.vision_tower.encoder.layers.3.self_attn.q_proj.weight")
    assert not rounds("model.multi_modal_projector.0.weight")
    assert not rounds("model.language_model.layers.3.mlp.gate.weight")
    assert not MoellavaQuantizationConfig().rounds("lm_head.weight")


PEAK = """
import threading, time, torch
from pathlib import Path
from moellava.model.language_model import LlamaMoeForCausalLM
from moellava.model.quantization import MoellavaQuantizationConfig

def held():  # bytes of its own: pages of the file are the system's to drop
    text = Path('/proc/self/status').read_text()
    return int(text.split('RssAnon:')[1].split()[0]) * 1024

def watch():
    while not done:
        found.append(held())
        time.sleep(0.001)

def load(folder):
    given = None if folder == 'warm' else MoellavaQuantizationConfig(bits=4, group_size=128)
    path = Path('PLACE') / folder
    return LlamaMoeForCausalLM.from_pretrained(
        path, dtype=torch.bfloat16, quantization_config=given
    )

torch.set_num_threads(1)
load('warm')
done, found, before = False, [], held()
watcher = threading.Thread(target=watch, daemon=True)
watcher.start()
model = load('dense')
done = True
watcher.join()
print(max(found) - before)
"""


def test_rounding_while_reading_never_holds_the_16_bit_model(tmp_path):
    """The peak of a process of its own."""
    sizes = {"hidden_size": 512, "intermediate_size": 1024, "num_hidden_layers": 4}
    with torch.device("meta"):
        model = LlamaMoeForCausalLM(small_config(**sizes, moe_layers="dense", vocab_size=999))
    model.to_empty(device="cpu").to(torch.bfloat16)
    for parameter in model.parameters():
        torch.nn.init.uniform_(parameter, -0.1, 0.1)
    model.save_pretrained(tmp_path / "dense")
    whole = sum(parameter.nbytes for parameter in model.parameters())
    LlamaMoeForCausalLM(small_config()).save_pretrained(tmp_path / "warm")
    taken = int(printed(PEAK.replace("PLACE", str(tmp_path)))[-1])
    largest = model.model.layers[0].mlp.experts.gate_up_proj.nbytes
    assert taken < 0.32 * whole + 3 * largest
    assert taken < 0.75 * whole
