"""Estimates of memory and work against autograd and torch; the table of docs/training.md."""

from pathlib import Path

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import LlamaConfig

from moellava.data import read_rows
from moellava.data.collate import ChatCollator
from moellava.testing import BIOMEDCLIP, write_tinyllama
from moellava.train import load_recipe
from moellava.train.estimates import CARD, estimate_flops, estimate_memory
from moellava.train.prepare import prepare_model
from tests.train.tiny import tiny_recipe

TINYLLAMA = LlamaConfig(
    hidden_size=2048,
    intermediate_size=5632,
    num_hidden_layers=22,
    num_attention_heads=32,
    num_key_value_heads=4,
)
# Rows over all epochs, mean and greatest length in tokens (196 of them an image): LLaVA-Med's
# 500k captions, 60k chats.
DATA = {
    "stage1": (500_000, 256, 512),
    "stage2": (3 * 60_000, 550, 1024),
    "stage3": (60_000, 550, 1024),
}
# Published peaks of dense bfloat16: RTX 4090 and A100. The share that is assumed to be reached on
# one card and on eight.
PEAKS = {"24 GB": 165e12, "80 GB": CARD.flops}
ONE, EIGHT = CARD.utilisation, 0.30
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
        hardware,
        f"`{name}`",
        f"{learning / 1e6:,.0f} M",
        at_once,
        f"{memory['weights']:.1f}",
        f"{memory['gradients'] + memory['optimizer']:.1f}",
        f"{memory['activations']:.1f}",
        f"**{memory['all']:.0f}**",
        f"{flops:.1e}",
        f"{one:.1f}",
        f"{one * ONE / EIGHT / 8:.1f}",
    )
    row = "| " + " | ".join(map(str, cells)) + " |"
    print(row)
    assert row in (Path(__file__).parents[2] / "docs" / "training.md").read_text()
    assert (
        memory["all"] < int(hardware.split()[0]) / 1.074 - 1.5
    )  # GB to GiB, and what the libraries take


def batch_and_model(recipe, rows):
    model, loaded = prepare_model(recipe)
    data = read_rows(recipe.data.train, images=recipe.data.images)
    return ChatCollator(loaded.processor)([data[index] for index in rows]), model.train()


def test_the_activation_estimate_is_near_what_autograd_keeps(tiny, tmp_path):
    recipe = tiny_recipe(tiny, "tune", tmp_path / "out")
    batch, model = batch_and_model(recipe, [1, 2, 3, 5])
    longest = batch["input_ids"].shape[1]
    whole = kept_bytes(model, batch)
    estimate = estimate_memory(model, recipe, longest=longest)["activations"] * 2**30
    assert 1 < estimate / whole < 2  # the estimate has the gradient of the logits too

    model.activation_checkpointing_enable()
    checkpointed = tiny_recipe(
        tiny, "tune", tmp_path / "out", "optim.activation_checkpointing=true"
    )
    less = estimate_memory(model, checkpointed, longest=longest)["activations"] * 2**30
    assert kept_bytes(model, batch) < less < estimate


def kept_bytes(model, batch):
    """Of all storages that autograd saves in a forward pass, each once, weights left out."""
    weights = {weight.untyped_storage().data_ptr() for weight in model.parameters()}
    kept = {}

    def keep(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = (
                storage.nbytes(),
                tensor,
            )  # held, so that no address is used twice
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        model(**batch, use_cache=False)
    return sum(num_bytes for num_bytes, _ in kept.values())


@pytest.mark.parametrize("stage", ["align", "tune"])
def test_the_work_estimate_is_near_torchs_flop_counter(stage, tiny, tmp_path):
    recipe = tiny_recipe(tiny, stage, tmp_path / "out")
    batch, model = batch_and_model(recipe, [1, 1])
    with FlopCounterMode(display=False) as counter:
        model(**batch, use_cache=False).loss.backward()
    length = batch["input_ids"].shape[1]
    estimate = 2 * estimate_flops(model, recipe, length=length, images_per_row=1)
    assert estimate == pytest.approx(counter.get_total_flops(), rel=0.35)
