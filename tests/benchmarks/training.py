"""What `moellava train` adds to a bare training step, and what cached features save, as ratios.

    python -m tests.benchmarks.training [step features]

Weights are random. `step` needs about 8 GB of memory.
"""

import argparse
import copy
import json
import os
import statistics
import tempfile
import time
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"

import torch
import transformers
from transformers import TrainerCallback

from moellava.model.builder_enhanced import load_pretrained_model
from moellava.testing import write_biomedclip, write_tinyllama
from moellava.testing.datasets import picture
from moellava.train import load_recipe, train
from moellava.train.arguments import training_arguments
from moellava.train.batches import build_collator, read_data, row_lengths
from moellava.train.gradient_steps import build_trainer
from moellava.train.prepare import prepare_model

SIZES = {
    "hidden_size": 2048,
    "intermediate_size": 5632,
    "num_attention_heads": 32,
    "num_key_value_heads": 4,
}
SMALL = {"hidden_size": 256, "intermediate_size": 704}


def write_rows(folder: Path, count: int) -> Path:
    """Questions of one length about pictures of 512 x 512."""
    (folder / "images").mkdir()
    rows = []
    for number in range(count):
        picture(number, size=(512, 512)).save(folder / "images" / f"{number}.jpg")
        turns = [
            {"from": "human", "value": "<image>\n" + "What is it? " * 8},
            {"from": "gpt", "value": "It is. " * 8},
        ]
        rows.append({"id": str(number), "image": f"{number}.jpg", "conversations": turns})
    (folder / "rows.json").write_text(json.dumps(rows))
    return folder / "rows.json"


def write_parts(folder: Path, *, num_hidden_layers: int, sizes: dict[str, int]) -> dict[str, str]:
    """BiomedCLIP's ViT-B/16 and a Llama whose vocabulary is small: the trainer does not see it."""
    model = write_tinyllama(
        folder / "llama",
        num_hidden_layers=num_hidden_layers,
        vocab_size=2000,
        dtype=torch.float32,
        **sizes,
    )
    return {
        "model_name_or_path": str(model),
        "mm_vision_tower": str(write_biomedclip(folder / "tower")),
    }


def recipe_of(folder: Path, rows: Path, *, steps: int, batch_size: int, **settings):
    return load_recipe(
        {
            "output_dir": str(folder),
            "data": {"train": str(rows), "images": str(rows.parent / "images"), "num_workers": 1}
            | settings.pop("data", {}),
            "optim": {
                "batch_size": batch_size,
                "per_device_batch_size": batch_size,
                "max_steps": steps,
                "precision": "fp32",
            },
            **settings,
        }
    )


class Turns(TrainerCallback):
    """After each step of the trainer, a bare step of a twin model on a batch of the same shape."""

    def __init__(self, model, batch):
        self.model, self.batch = model.train(), batch
        learning = [weight for weight in model.parameters() if weight.requires_grad]
        self.optimizer = torch.optim.AdamW(learning, lr=2e-5, weight_decay=0.0)
        self.ours: list[float] = []
        self.bare: list[float] = []
        self.since = 0.0

    def on_step_end(self, args, state, control, **kwargs):
        now = time.perf_counter()
        self.ours.append(now - self.since)
        self.optimizer.zero_grad()
        self.model(**self.batch, output_router_logits=True, use_cache=False).loss.backward()
        self.optimizer.step()
        self.since = time.perf_counter()
        self.bare.append(self.since - now)


def step(folder: Path, steps: int = 12) -> None:
    """Stage 3: a cycle of the trainer (batch, step, clipping, counts, log) and a bare step."""
    rows = write_rows(folder, 2 * steps)
    loaded = load_pretrained_model(
        write_parts(folder, num_hidden_layers=2, sizes=SIZES), moe_config=False
    )
    loaded.model.save_pretrained(folder / "dense")
    loaded.processor.save_pretrained(folder / "dense")
    recipe = recipe_of(
        folder / "run",
        rows,
        steps=steps,
        batch_size=2,
        stage="experts",
        start_from=str(folder / "dense"),
        after="any",
    )
    arguments = training_arguments(recipe, show_progress=False)
    data, (model, loaded) = read_data(recipe), prepare_model(recipe)
    trainer = build_trainer(recipe, arguments, data, model, loaded)
    batch = trainer.collator([data.train[0], data.train[1]])
    batch.pop("row_ids")
    turns = Turns(copy.deepcopy(model), batch)
    trainer.add_callback(turns)
    trainer.train()
    ours, bare = turns.ours[2:], turns.bare[2:]
    learning = sum(weight.numel() for weight in model.parameters() if weight.requires_grad)
    print(
        f"{learning / 1e6:.0f} M weights learn; batch of {tuple(batch['input_ids'].shape)} tokens"
    )
    print("| trainer, s a step | bare, s a step | ratio, asked <= 1.1 |\n|---|---|---|")
    ratio = statistics.median(ours) / statistics.median(bare)
    print(f"| {spread(ours)} | {spread(bare)} | {ratio:.3f} |")


def features(folder: Path, steps: int = 6, batch_size: int = 8) -> None:
    """Stage 1, every step on the same rows: patch tokens of the file against running the tower."""
    rows = write_rows(folder, steps * batch_size)
    print(
        "| language model | cached, steps/s | encoding, steps/s | ratio, asked >= 3 "
        "| largest difference of losses |"
    )
    print("|---|---|---|---|---|")
    for name, num_hidden_layers, sizes in (
        ("4 layers of 256", 4, SMALL),
        ("1 layer of 2048", 1, SIZES),
    ):
        place = folder / name.replace(" ", "_")
        parts, logs = write_parts(place, num_hidden_layers=num_hidden_layers, sizes=sizes), {}
        for kind, data in (("encoding", {}), ("cached", {"features": str(place / "features")})):
            recipe = recipe_of(
                place / kind,
                rows,
                steps=steps,
                batch_size=batch_size,
                stage="align",
                model=parts,
                data=data,
            )
            logs[kind] = [
                entry for entry in train(recipe, show_progress=False).log if "loss" in entry
            ]
        tokens = batch_size * num_tokens_of_a_row(recipe)
        median = {
            kind: statistics.median(entry["tokens_per_second"] for entry in log[1:]) / tokens
            for kind, log in logs.items()
        }
        apart = max(
            abs(a["loss"] - b["loss"])
            for a, b in zip(logs["cached"], logs["encoding"], strict=True)
        )
        ratio = median["cached"] / median["encoding"]
        rates = f"{median['cached']:.2f} | {median['encoding']:.2f}"
        print(f"| {name} | {rates} | {ratio:.2f} | {apart:.1e} |", flush=True)


def num_tokens_of_a_row(recipe) -> int:
    loaded = load_pretrained_model(Path(recipe.output_dir) / "model")
    (length,) = set(row_lengths(read_data(recipe).train, build_collator(recipe, loaded.processor)))
    return length


def spread(values: list[float]) -> str:
    return f"{statistics.median(values):.3f} ({min(values):.3f}-{max(values):.3f})"


if __name__ == "__main__":
    sections = {"step": step, "features": features}
    parser = argparse.ArgumentParser()
    parser.add_argument("sections", nargs="*", default=list(sections))
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    for section in parser.parse_args().sections:
        with tempfile.TemporaryDirectory() as folder:
            print(
                f"\n{section}: torch {torch.__version__}, transformers {transformers.__version__}"
            )
            sections[section](Path(folder))
