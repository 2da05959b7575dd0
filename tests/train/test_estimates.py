"""The table of hardware and time in docs/training.md is what `moellava.train.plan` gives for the real models."""

from pathlib import Path

import pytest
from transformers import LlamaConfig

from moellava.testing import BIOMEDCLIP, write_tinyllama
from moellava.train import load_recipe
from moellava.train.estimates import estimate_flops, estimate_memory
from moellava.train.prepare import prepare_model

TINYLLAMA = LlamaConfig(
    hidden_size=2048,
    intermediate_size=5632,
    num_hidden_layers=22,
    num_attention_heads=32,
    num_key_value_heads=4,
)
# Rows over all epochs, mean and greatest length in tokens (196 of them an image): LLaVA-Med's 500k captions, 60k chats.
DATA = {
    "stage1": (500_000, 256, 512),
    "stage2": (3 * 60_000, 550, 1024),
    "stage3": (60_000, 550, 1024),
}
# Published peaks of dense bfloat16: RTX 4090 and A100. What share is assumed to be reached, on one card and on eight.
PEAKS = {"24 GB": 165e12, "80 GB": 312e12}
ONE, EIGHT = 0.35, 0.30
RUNS = (
    ("stage1_align", "24 GB", 8),
    ("stage2_tune_lora", "24 GB", 4),
    ("stage3_experts_lora", "24 GB", 4),
    ("stage1_align", "80 GB", 32),
    ("stage2_tune", "80 GB", 16),
    ("stage3_experts", "80 GB", 16),
)


@pytest.fixture(scope="module")
def parts(tmp_path_factory, hub_cache):
    """TinyLlama's own sizes without weights: a plan reads configs only."""
    folder = write_tinyllama(tmp_path_factory.mktemp("parts") / "tinyllama")
    TINYLLAMA.save_pretrained(folder)
    return [f"model.model_name_or_path={folder}", f"model.mm_vision_tower={hub_cache[BIOMEDCLIP]}"]


@pytest.mark.parametrize(("name", "hardware", "at_once"), RUNS)
def test_the_documented_estimate_is_the_computed_one(name, hardware, at_once, parts):
    recipe = load_recipe(
        name, ["after=any", "output_dir=unused", f"optim.per_device_batch_size={at_once}", *parts]
    )
    model, _ = prepare_model(recipe, on_meta=True)
    num_rows, mean, longest = DATA[name[:6]]
    memory = estimate_memory(model, recipe, longest=longest)
    flops = num_rows * estimate_flops(model, recipe, length=mean, images_per_row=1)
    one = flops / (PEAKS[hardware] * ONE) / 3600
    learning = sum(weight.numel() for weight in model.parameters() if weight.requires_grad)
    cells = (
        hardware, f"`{name}`", f"{learning / 1e6:,.0f} M", at_once, f"{memory['weights']:.1f}",
        f"{memory['gradients'] + memory['optimizer']:.1f}", f"{memory['activations']:.1f}", f"**{memory['all']:.0f}**",
        f"{flops:.1e}", f"{one:.1f}", f"{one * ONE / EIGHT / 8:.1f}",
    )  # fmt: skip
    row = "| " + " | ".join(map(str, cells)) + " |"
    print(row)
    assert row in (Path(__file__).parents[2] / "docs" / "training.md").read_text()
    assert (
        memory["all"] < int(hardware.split()[0]) / 1.074 - 1.5
    )  # GB to GiB, and what the libraries take
