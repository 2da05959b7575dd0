"""Adapters of other people: what is opened, what is refused, and what is saved of the base."""

import json
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from moellava.model.checkpoint.adapter import CONFIG_FILE, name_base, read_adapter

peft = pytest.importorskip("peft")


def make_llama(place: str = "/home/somebody/llama") -> LlamaForCausalLM:
    torch.manual_seed(0)
    sizes = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "vocab_size": 11}
    model = LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=2)).eval()
    model.name_or_path = place
    return model


@pytest.fixture
def folder(tmp_path) -> Path:
    config = peft.LoraConfig(target_modules=["q_proj"], init_lora_weights=False)
    peft.get_peft_model(make_llama(), config).save_pretrained(tmp_path / "adapter")
    return tmp_path / "adapter"


def change(folder: Path, **settings: object) -> None:
    path = folder / CONFIG_FILE
    path.write_text(json.dumps(json.loads(path.read_text()) | settings))


def test_it_computes_what_peft_reads(folder):
    ids = torch.arange(5)[None]
    ours = read_adapter(make_llama(), folder)
    theirs = peft.PeftModel.from_pretrained(make_llama(), str(folder))
    with torch.no_grad():
        assert torch.equal(ours(ids).logits, theirs(ids).logits)
        assert not torch.allclose(ours(ids).logits, make_llama()(ids).logits)


def test_a_config_that_names_a_module_to_import_is_refused(folder, tmp_path, monkeypatch):
    """Older PEFTs import `megatron_core` by the name in the file; newer ones have a list."""
    (tmp_path / "trap.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
    monkeypatch.syspath_prepend(tmp_path)
    change(folder, megatron_config={"x": 1}, megatron_core="trap")
    with pytest.raises(ValueError, match=r"adapter_config\.json has a megatron_config"):
        read_adapter(make_llama(), folder)
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("kind", ["XLORA", "PROMPT_TUNING", "lora", None])
def test_another_kind_is_refused(folder, kind):
    change(folder, peft_type=kind)
    with pytest.raises(ValueError, match=r"adapter_config\.json .*Unknown kind of adapter"):
        read_adapter(make_llama(), folder)


def test_a_missing_file_is_named(folder):
    (folder / "adapter_model.safetensors").unlink()
    with pytest.raises((OSError, ValueError), match=r"adapter"):
        read_adapter(make_llama(), folder)
    (folder / CONFIG_FILE).unlink()
    with pytest.raises(OSError, match=CONFIG_FILE):
        read_adapter(make_llama(), folder)


def test_the_path_of_the_base_becomes_a_name(folder):
    assert "/home/somebody" in (folder / CONFIG_FILE).read_text()
    assert "/home/somebody" in (folder / "README.md").read_text()
    name_base(folder, "owner/llama")
    settings = json.loads((folder / CONFIG_FILE).read_text())
    assert settings["base_model_name_or_path"] == "owner/llama"
    assert not (folder / "README.md").exists()


def test_a_folder_without_an_adapter_is_left_alone(tmp_path):
    (tmp_path / "README.md").touch()
    name_base(tmp_path, "owner/llama")
    assert (tmp_path / "README.md").exists()
