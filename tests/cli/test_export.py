"""`moellava export` as a user types it."""

import re

import torch
from typer.testing import CliRunner

from moellava.cli import app as cli
from moellava.model.language_model import LlamaMoeConfig, LlamaMoeForCausalLM
from moellava.testing.language_models import write_llama_tokenizer


def run(*words):
    result = CliRunner().invoke(cli, [str(word) for word in words])
    return result.exit_code, re.sub(r"\s+", " ", result.output)


def test_export_mixtral_says_what_it_wrote_and_what_it_costs(tmp_path):
    torch.manual_seed(0)
    sizes = {"vocab_size": 600, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 4}
    config = LlamaMoeConfig(**sizes, num_attention_heads=2, num_key_value_heads=1)
    LlamaMoeForCausalLM(config).save_pretrained(tmp_path / "model")
    write_llama_tokenizer(tmp_path / "model", vocab_size=600)
    code, text = run("export", "mixtral", tmp_path / "model", "--out", tmp_path / "out")
    assert code == 0, text
    assert "4 layers of 4 experts, 2 per token, 41," in text
    extra = 2 * (3 * 3 * 16 * 24 + 4 * 16)  # three more MLPs and a router in each of two layers
    assert f"{extra:,} of them are copies or zeros: 2 dense layers became equal experts" in text
    code, text = run("export", "mixtral", tmp_path / "model", "--out", tmp_path / "out")
    assert code == 1
    assert "is there already" in text
