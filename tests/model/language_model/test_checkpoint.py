"""Reading checkpoints: folders, ids in a cache, shards, pickles, and files that do not fit."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import LlamaForCausalLM

from moellava.model.language_model import dense_state_dict, read_state_dict, upcycle
from moellava.testing import TINYLLAMA


def assert_same(state_dict, model):
    expected = {name: value for name, value in model.state_dict().items() if name in state_dict}
    assert all(torch.equal(state_dict[name], value) for name, value in expected.items())
    return expected


@pytest.mark.parametrize("shard_size", ["1GB", "40KB"], ids=["one file", "shards"])
@pytest.mark.parametrize("tied", [False, True])
def test_state_dict_is_the_models_own(shard_size, tied, make_dense, tmp_path):
    dense = make_dense(tie_word_embeddings=tied)
    dense.save_pretrained(tmp_path, max_shard_size=shard_size)
    state_dict = dense_state_dict(tmp_path)
    assert ("lm_head.weight" in state_dict) is not tied
    assert state_dict.keys() | {"lm_head.weight"} == dense.state_dict().keys()
    assert_same(state_dict, dense)


def test_weights_only_pickle_is_read(make_dense, tmp_path):
    dense = make_dense()
    dense.config.save_pretrained(tmp_path)
    torch.save(dense.state_dict(), tmp_path / "pytorch_model.bin")
    assert_same(dense_state_dict(tmp_path), dense)


def test_pickle_that_runs_code_is_refused(make_dense, tmp_path):
    class Attack:
        def __reduce__(self):
            return (open, (str(tmp_path / "attacked"), "w"))

    make_dense().config.save_pretrained(tmp_path)
    torch.save({"model.embed_tokens.weight": Attack()}, tmp_path / "pytorch_model.bin")
    with pytest.raises(
        ValueError, match=r"pytorch_model\.bin is a pickle that wants more than tensors"
    ):
        dense_state_dict(tmp_path)
    assert not (tmp_path / "attacked").exists()


def test_hub_id_is_read_from_the_cache_without_network(hub_cache, no_network):
    state_dict = dense_state_dict(TINYLLAMA)
    assert_same(state_dict, LlamaForCausalLM.from_pretrained(TINYLLAMA))
    assert state_dict["model.embed_tokens.weight"].dtype == torch.bfloat16
    assert (
        dense_state_dict(TINYLLAMA, dtype=torch.float32)["model.norm.weight"].dtype == torch.float32
    )


def test_revision_and_cache_dir_are_used(hub_cache, no_network, tmp_path):
    with pytest.raises(OSError, match=TINYLLAMA):
        dense_state_dict(TINYLLAMA, cache_dir=tmp_path, local_files_only=True)
    with pytest.raises(OSError, match="f00d"):
        dense_state_dict(TINYLLAMA, revision="f00d" * 10)


def test_existing_folder_wins_over_a_hub_id(hub_cache, make_dense, tmp_path, monkeypatch):
    dense = make_dense()
    dense.save_pretrained(tmp_path / TINYLLAMA)
    monkeypatch.chdir(tmp_path)
    assert_same(dense_state_dict(TINYLLAMA), dense)


def test_home_folder_may_be_written_with_a_tilde(make_dense, tmp_path, monkeypatch):
    dense = make_dense()
    dense.save_pretrained(tmp_path / "dense")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert_same(dense_state_dict("~/dense"), dense)


def test_missing_folder_says_so(tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere does not exist"):
        dense_state_dict(tmp_path / "nowhere")


def test_folder_without_weights_names_the_files_it_needs(make_dense, tmp_path):
    make_dense().config.save_pretrained(tmp_path)
    with pytest.raises(OSError, match=r"No weights in .*model\.safetensors"):
        dense_state_dict(tmp_path)


def test_missing_shard_is_named(make_dense, tmp_path):
    make_dense().save_pretrained(tmp_path, max_shard_size="40KB")
    shard = sorted(
        set(
            json.loads((tmp_path / "model.safetensors.index.json").read_text())[
                "weight_map"
            ].values()
        )
    )[1]
    (tmp_path / shard).unlink()
    with pytest.raises(OSError, match=shard):
        dense_state_dict(tmp_path)


@pytest.mark.parametrize("read", [dense_state_dict, upcycle], ids=["dense", "upcycled"])
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda sd: sd.pop("model.layers.2.mlp.up_proj.weight"),
            r"missing keys: model\.layers\.2\.mlp\.up_proj\.weight\.",
        ),
        (lambda sd: sd.update(extra=torch.zeros(1)), r"unexpected keys: extra\."),
        (
            lambda sd: sd.update({"model.norm.weight": torch.zeros(31)}),
            r"mismatched keys: model\.norm\.weight: \(31,\) instead of \(32,\)",
        ),
    ],
)
def test_weights_that_do_not_fit_are_named(read, change, message, dense_folder):
    state_dict = load_file(dense_folder / "model.safetensors")
    change(state_dict)
    save_file(state_dict, dense_folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=message):
        read(dense_folder)


def test_rotary_buffers_of_old_checkpoints_are_ignored(dense_folder, make_dense):
    state_dict = load_file(dense_folder / "model.safetensors")
    state_dict["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.zeros(4)
    save_file(state_dict, dense_folder / "model.safetensors", metadata={"format": "pt"})
    assert_same(dense_state_dict(dense_folder), make_dense())


def test_mixture_is_read_as_it_is_but_not_as_dense(dense_folder, tmp_path):
    mixture = upcycle(dense_folder, dtype=torch.bfloat16)
    mixture.save_pretrained(tmp_path / "mixture")
    state_dict = read_state_dict(tmp_path / "mixture", dtype=torch.float16)
    assert state_dict.keys() == mixture.state_dict().keys()
    assert state_dict["model.layers.0.mlp.gate.weight"].dtype == torch.float32
    assert state_dict["model.layers.0.mlp.experts.down_proj"].dtype == torch.float16
    with pytest.raises(
        ValueError, match=r"is a mixture of experts \('llama_moe'\), not a dense model"
    ):
        dense_state_dict(tmp_path / "mixture")


@pytest.mark.parametrize("read", [dense_state_dict, upcycle], ids=["dense", "upcycled"])
@pytest.mark.parametrize("field", ["num_hidden_layers", "num_attention_heads", "vocab_size"])
def test_a_config_that_asks_for_too_much_is_refused_at_once(read, field, dense_folder):
    config = json.loads((dense_folder / "config.json").read_text())
    (dense_folder / "config.json").write_text(json.dumps(config | {field: 10**9}))
    with pytest.raises(
        ValueError, match=rf"{field} in the config of .*dense asks for 1,000,000,000"
    ):
        read(dense_folder)


@pytest.mark.parametrize("text", ["1" * 5000, "1e999", "-1e400"])
def test_a_number_without_end_is_an_error_that_names_the_config(text, dense_folder):
    config = (dense_folder / "config.json").read_text()
    (dense_folder / "config.json").write_text(
        config.replace("{", '{"num_experts": ' + text + ",", 1)
    )
    with pytest.raises((ValueError, OSError), match="dense"):
        upcycle(dense_folder)


@pytest.mark.parametrize("read", [dense_state_dict, upcycle], ids=["dense", "upcycled"])
def test_an_integer_dtype_is_refused(read, dense_folder):
    with pytest.raises(ValueError, match=r"dtype is torch\.int8; give torch\.float32"):
        read(dense_folder, dtype=torch.int8)
