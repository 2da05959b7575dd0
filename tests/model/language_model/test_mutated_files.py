"""Broken files of language models: whatever they hold, errors are of an expected kind."""

import json
from pathlib import Path

import pytest
import torch

from moellava.model.language_model import LlamaMoeConfig, imported_state_dict, read_state_dict
from moellava.model.language_model.router_weights import read_router
from tests.model.language_model.test_mixtures import make_mixtral, write_moe_llava
from tests.mutations import require_named_errors


@pytest.fixture
def checkpoint(make_dense, tmp_path) -> Path:
    make_dense(num_hidden_layers=1, vocab_size=11).save_pretrained(tmp_path / "broken-model")
    return tmp_path / "broken-model"


@pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
def test_files_of_a_dense_checkpoint(checkpoint, name):
    is_json = name.endswith(".json")
    require_named_errors(
        checkpoint / name, lambda: read_state_dict(checkpoint), count=60, is_json=is_json
    )


def test_a_pickle(make_dense, tmp_path):
    folder = tmp_path / "broken-model"
    dense = make_dense(num_hidden_layers=1, vocab_size=11)
    dense.config.save_pretrained(folder)
    file = folder / "pytorch_model.bin"
    torch.save(dense.state_dict(), file)
    require_named_errors(file, lambda: read_state_dict(folder), count=60, is_json=False)


def test_an_index_of_shards(make_dense, tmp_path):
    folder = tmp_path / "broken-model"
    make_dense(num_hidden_layers=1, vocab_size=11).save_pretrained(folder, max_shard_size="10KB")
    index = folder / "model.safetensors.index.json"
    require_named_errors(index, lambda: read_state_dict(folder), count=60, is_json=True)


def test_a_published_mixtures_config(tiny, tmp_path):
    small = {**tiny, "num_hidden_layers": 1, "vocab_size": 11}
    state_dict = make_mixtral(small).state_dict()
    folder = write_moe_llava(tmp_path / "broken-model", small, state_dict, layers=[0], top_k=2)
    require_named_errors(
        folder / "config.json", lambda: imported_state_dict(folder), count=60, is_json=True
    )


def test_a_routers_file(tmp_path):
    (tmp_path / "broken-model").mkdir()
    file = tmp_path / "broken-model" / "router.pth"
    torch.save({"fc1.weight": torch.zeros(4, 32)}, file)
    config = LlamaMoeConfig(hidden_size=32, num_attention_heads=4, num_experts=4)
    require_named_errors(file, lambda: read_router(file, config), count=40, is_json=False)


def test_an_index_does_not_read_outside_its_folder(make_dense, tmp_path):
    folder = tmp_path / "model"
    make_dense().save_pretrained(folder)
    (folder / "model.safetensors").rename(tmp_path / "outside.safetensors")
    names = make_dense().state_dict()
    weight_map = dict.fromkeys(names, "../outside.safetensors")
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    with pytest.raises(ValueError, match=r"'\.\./outside\.safetensors', which is not a plain name"):
        read_state_dict(folder)
