"""Tiny dense Llamas, in memory and on disk, and what it takes to shrink a config for a test."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

TINY = {
    "vocab_size": 99,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "pad_token_id": 0,
}


@pytest.fixture
def tiny() -> dict[str, Any]:
    """Fields of a Llama config with four small layers."""
    return dict(TINY)


@pytest.fixture
def make_dense() -> Callable[..., LlamaForCausalLM]:
    """Build a tiny dense Llama with weights large enough to tell two functions apart."""

    def make(seed: int = 0, **fields: Any) -> LlamaForCausalLM:
        torch.manual_seed(seed)
        return LlamaForCausalLM(LlamaConfig(**{**TINY, "initializer_range": 0.2, **fields})).eval()

    return make


@pytest.fixture
def dense_folder(make_dense: Callable[..., LlamaForCausalLM], tmp_path: Path) -> Path:
    """A dense checkpoint in one safetensors file, float32."""
    make_dense().save_pretrained(tmp_path / "dense")
    return tmp_path / "dense"


@pytest.fixture
def ids() -> torch.Tensor:
    """(2, 9) token ids without the padding id."""
    return torch.randint(1, 99, (2, 9), generator=torch.Generator().manual_seed(1))
