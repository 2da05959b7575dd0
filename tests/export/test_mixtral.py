"""The export against transformers' Mixtral, and llama.cpp where it is installed."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM, MixtralForCausalLM

from moellava.export import export_mixtral
from moellava.model.builder_enhanced import load_pretrained_model
from moellava.model.language_model import LlamaMoeConfig, LlamaMoeForCausalLM
from moellava.testing import TINYLLAMA
from moellava.testing.language_models import write_llama_tokenizer

SMALL = {
    "vocab_size": 600,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "initializer_range": 0.2,
}
# Name to the fields of a mixture, or None for a dense Llama.
MODELS = {
    "every second layer": {},
    "all layers": {"moe_layers": "dense"},
    "top 1 of 3": {"num_experts": 3, "num_experts_per_tok": 1},
    "top 3 of 3": {"num_experts": 3, "num_experts_per_tok": 3},
    "narrow experts": {"moe_intermediate_size": 24},
    "wide experts": {"moe_intermediate_size": 64, "tie_word_embeddings": True},
    "rotary scaling": {
        "rope_parameters": {"rope_type": "linear", "factor": 4.0, "rope_theta": 5000.0}
    },
    "dense": None,
}


@pytest.fixture(scope="module")
def tokenizer_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer")
    write_llama_tokenizer(folder, vocab_size=600)
    return folder


@pytest.fixture
def save(tmp_path, tokenizer_folder):
    """A function: a language model with its tokenizer, saved; returns the model and the folder."""

    def save_model(fields=None, folder=tmp_path / "model"):
        torch.manual_seed(0)
        if fields is None:
            model = LlamaForCausalLM(LlamaConfig(**SMALL)).eval()
        else:
            model = LlamaMoeForCausalLM(LlamaMoeConfig(**{**SMALL, **fields})).eval()
        model.save_pretrained(folder)
        AutoTokenizer.from_pretrained(tokenizer_folder).save_pretrained(folder)
        return model, folder

    return save_model


@pytest.fixture
def ids():
    return torch.randint(3, 600, (2, 11), generator=torch.Generator().manual_seed(0))


def open_mixtral(folder):
    model, info = MixtralForCausalLM.from_pretrained(
        folder, output_loading_info=True, dtype="float32"
    )
    assert not any(info.values()), info
    return model.eval()


def require_equal(model, exported, ids):
    with torch.no_grad():
        expected, found = model(input_ids=ids).logits, exported(input_ids=ids).logits
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5 * float(expected.abs().max()))


@pytest.mark.parametrize("name", MODELS)
def test_logits_equal_ours(name, save, ids, tmp_path):
    model, folder = save(MODELS[name])
    written = export_mixtral(folder, tmp_path / "out")
    exported = open_mixtral(tmp_path / "out")
    require_equal(model, exported, ids)
    assert written.parameters == exported.num_parameters()


def test_a_joined_models_text_answers_are_equal(hub_cache, small_biomedclip, tmp_path):
    parts = {"model_name_or_path": TINYLLAMA, "mm_vision_tower": str(small_biomedclip)}
    loaded = load_pretrained_model(parts, moe_config={"noise": 1.0}, dtype="float32")
    loaded.model.save_pretrained(tmp_path / "model")
    loaded.processor.save_pretrained(tmp_path / "model")
    export_mixtral(tmp_path / "model", tmp_path / "out")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    chat = [{"role": "user", "content": "Which organ is shown?"}]
    options = {"add_generation_prompt": True, "return_tensors": "pt", "return_dict": True}
    inputs = tokenizer.apply_chat_template(chat, **options)
    theirs = open_mixtral(tmp_path / "out").generate(**inputs, max_new_tokens=8, do_sample=False)
    answer = tokenizer.decode(theirs[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    assert answer == loaded.answer(None, chat[0]["content"], max_new_tokens=8)[0]
    assert "endgeneration" not in tokenizer.chat_template


def test_several_files_hold_the_same_weights(save, ids, tmp_path):
    model, folder = save({})
    export_mixtral(folder, tmp_path / "out", max_shard_size="50KB")
    files = sorted(tmp_path.glob("out/*.safetensors"))
    assert len(files) > 3
    assert all(file.stat().st_size < 100_000 for file in files)
    require_equal(model, open_mixtral(tmp_path / "out"), ids)


def test_bfloat16_stays_and_routers_stay_float32(save, tmp_path):
    from safetensors import safe_open

    model, _ = save({})
    folder = tmp_path / "half"
    LlamaMoeForCausalLM.from_pretrained(tmp_path / "model", dtype="bfloat16").save_pretrained(
        folder
    )
    AutoTokenizer.from_pretrained(tmp_path / "model").save_pretrained(folder)
    assert export_mixtral(folder, tmp_path / "out").config.dtype == torch.bfloat16
    with safe_open(tmp_path / "out" / "model.safetensors", framework="pt") as file:
        name = "model.layers.0.block_sparse_moe.{}.weight"
        router, expert = (file.get_tensor(name.format(part)) for part in ("gate", "experts.3.w2"))
    assert (router.dtype, expert.dtype) == (torch.float32, torch.bfloat16)
    assert torch.equal(router, model.model.layers[0].mlp.gate.weight)


@pytest.mark.parametrize(
    ("fields", "reasons"),
    [
        ({"meta_expert": True}, ["meta_expert=True"]),
        ({"router_bias": True, "norm_topk_prob": False}, ["router_bias=True", "norm_topk_prob"]),
        ({"attention_bias": True, "hidden_act": "gelu"}, ["attention_bias=True", "'gelu'"]),
    ],
)
def test_what_has_no_exact_form_is_refused_with_every_reason(fields, reasons, save, tmp_path):
    _, folder = save(fields)
    with pytest.raises(ValueError, match="no exact form") as caught:
        export_mixtral(folder, tmp_path / "out")
    assert all(reason in str(caught.value) for reason in reasons)
    assert not (tmp_path / "out").exists()


def test_other_folders_are_refused_by_name(save, tmp_path, hub_cache):
    from moellava.testing import OPENAI_CLIP

    _, folder = save({})
    with pytest.raises(FileExistsError, match="is there already"):
        export_mixtral(folder, folder)
    with pytest.raises(ValueError, match=r"a 'clip' checkpoint; expected"):
        export_mixtral(hub_cache[OPENAI_CLIP], tmp_path / "out")
    config = json.loads((folder / "config.json").read_text())
    quantised = config | {"quantization_config": {"quant_method": "moellava"}}
    (folder / "config.json").write_text(json.dumps(quantised))
    with pytest.raises(ValueError, match="quantised"):
        export_mixtral(folder, tmp_path / "out")
    (folder / "base.json").write_text("{}")
    with pytest.raises(ValueError, match="a difference from its base"):
        export_mixtral(folder, tmp_path / "out")


PEAK = """
import resource, sys
from moellava.export import export_mixtral
def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
export_mixtral(sys.argv[1], sys.argv[2] + "1")  # what torch and transformers keep
before = peak()
export_mixtral(sys.argv[3], sys.argv[2] + "2", max_shard_size="16MB")
print(peak() - before)
"""


def test_memory_is_that_of_a_file_of_weights(save, tmp_path):
    wide = {"hidden_size": 256, "intermediate_size": 1024, "num_hidden_layers": 12}
    _, tiny = save({})
    _, large = save(wide, tmp_path / "large")  # 127 MB, and 157 MB exported
    words = [sys.executable, "-c", PEAK, str(tiny), str(tmp_path / "out"), str(large)]
    grown = float(subprocess.run(words, check=True, capture_output=True, text=True).stdout)
    size = sum(file.stat().st_size for file in tmp_path.glob("out2/*.safetensors")) / 2**20
    assert size > 100
    assert grown < 64  # MiB: a file of 16, a fused weight of 8, and what is on its way out


@pytest.mark.skipif("MOELLAVA_LLAMA_CPP" not in os.environ, reason="llama.cpp's converter is here")
@pytest.mark.parametrize("name", ["every second layer", "all layers", "dense"])
def test_llama_cpp_gives_the_same_greedy_tokens(name, save, tmp_path):
    """MOELLAVA_LLAMA_CPP names a folder with convert_hf_to_gguf.py; xllamacpp runs the model."""
    xllamacpp = pytest.importorskip("xllamacpp")
    wide = {"hidden_size": 256, "intermediate_size": 512}  # what GGUF's blocks ask for
    fields = MODELS[name]
    model, folder = save({**fields, **wide} if fields is not None else None)
    with torch.no_grad():  # llama.cpp does not report tokens of incomplete characters
        model.lm_head.weight[:259] = 0
    model.save_pretrained(folder)
    export_mixtral(folder, tmp_path / "out")
    converter = Path(os.environ["MOELLAVA_LLAMA_CPP"]) / "convert_hf_to_gguf.py"
    gguf = tmp_path / "model.gguf"
    words = [sys.executable, str(converter), str(tmp_path / "out"), "--outfile", str(gguf)]
    subprocess.run([*words, "--outtype", "f32"], check=True, capture_output=True)

    params = xllamacpp.CommonParams()
    params.model.path = str(gguf)
    params.n_ctx, params.n_gpu_layers, params.warmup = 256, 0, False
    params.cpuparams.n_threads = 1
    # By default keys and values are kept in float16.
    params.cache_type_k = params.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
    params.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
    server = xllamacpp.Server(params)
    prompt = AutoTokenizer.from_pretrained(folder)("Which organ is shown?")["input_ids"]
    answer = server.handle_completions(
        {"prompt": prompt, "max_tokens": 24, "temperature": 0.0, "logprobs": 1}
    )
    tokens = [token["id"] for token in answer["choices"][0]["logprobs"]["content"]]
    ours = model.generate(torch.tensor([prompt]), max_new_tokens=24, do_sample=False)
    assert tokens == ours[0, len(prompt) :].tolist()
