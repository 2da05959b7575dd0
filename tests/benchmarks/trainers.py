"""Rows per second of `moellava train` and of TRL's SFTTrainer, on the same rows and model.

python -m tests.benchmarks.trainers [--repeats N]
Both read the same images, batch and step alike, and write one checkpoint at the end.
"""

import argparse
import json
import statistics
import tempfile
from pathlib import Path

import datasets
import numpy as np
import torch
import trl
from PIL import Image

from moellava.model.builder_enhanced import load_pretrained_model
from moellava.testing import write_biomedclip, write_tinyllama
from moellava.train import load_recipe, train

NUM_ROWS, BATCH, STEPS = 64, 8, 8


def write(folder: Path) -> None:
    write_biomedclip(folder / "biomedclip_tiny", vision="test_vit", image_size=160)
    write_tinyllama(
        folder / "tinyllama_tiny", hidden_size=256, intermediate_size=512, num_hidden_layers=4,
        num_attention_heads=4, vocab_size=420,
    )  # fmt: skip
    rng = np.random.default_rng(0)
    (folder / "images").mkdir()
    rows = []
    for number in range(NUM_ROWS):
        pixels = rng.integers(0, 256, (256, 256, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / "images" / f"{number}.png")
        question = "What is seen? " + "Look. " * (number % 7)
        rows.append(
            {
                "image": f"{number}.png",
                "conversations": [
                    {"from": "human", "value": f"<image>\n{question}"},
                    {"from": "gpt", "value": "the left lung is clear"},
                ],
            }
        )
    (folder / "rows.json").write_text(json.dumps(rows))


def parts(folder: Path) -> dict[str, str]:
    return {
        "model_name_or_path": str(folder / "tinyllama_tiny"),
        "mm_vision_tower": str(folder / "biomedclip_tiny"),
    }


def ours(folder: Path, out: Path) -> float:
    recipe = load_recipe(
        {
            "stage": "tune",
            "after": "any",
            "model": parts(folder),
            "output_dir": str(out),
            "data": {
                "train": str(folder / "rows.json"),
                "images": str(folder / "images"),
                "num_workers": 0,
                "group_by_length": False,
            },
            "optim": {
                "batch_size": BATCH,
                "per_device_batch_size": BATCH,
                "max_steps": STEPS,
                "precision": "fp32",
            },
            "logging": {"report_to": []},
        }
    )
    log = train(recipe, show_progress=False).log
    return next(e["train_samples_per_second"] for e in log if "train_samples_per_second" in e)


def trls(folder: Path, out: Path) -> float:
    loaded = load_pretrained_model(parts(folder), moe_config=False, dtype="float32")
    loaded.model.model.vision_tower.requires_grad_(False)
    rows = [
        {
            "image": str(folder / "images" / row["image"]),
            "messages": [
                {"role": "user", "content": row["conversations"][0]["value"].split("\n")[1]},
                {"role": "assistant", "content": row["conversations"][1]["value"]},
            ],
        }
        for row in json.loads((folder / "rows.json").read_text())
    ]
    trainer = trl.SFTTrainer(
        loaded.model,
        args=trl.SFTConfig(
            output_dir=str(out), max_steps=STEPS, per_device_train_batch_size=BATCH,
            max_length=None, assistant_only_loss=True, gradient_checkpointing=False, bf16=False,
            report_to="none", logging_steps=1, use_cpu=True, disable_tqdm=True,
            learning_rate=2e-5, dataloader_num_workers=0, dataloader_pin_memory=False,
        ),
        train_dataset=datasets.Dataset.from_list(rows).cast_column("image", datasets.Image()),
        processing_class=loaded.processor,
    )  # fmt: skip
    return trainer.train().metrics["train_samples_per_second"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=5)
    repeats = parser.parse_args().repeats
    found: dict[str, list[float]] = {"moellava train": [], "TRL SFTTrainer": []}
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        write(folder)
        for number in range(repeats):
            found["moellava train"].append(ours(folder, folder / f"ours{number}"))
            found["TRL SFTTrainer"].append(trls(folder, folder / f"trls{number}"))
            print({name: round(rates[-1], 2) for name, rates in found.items()}, flush=True)
    print(f"torch {torch.__version__}, TRL {trl.__version__}, {torch.get_num_threads()} threads")
    for name, rates in found.items():
        print(f"{name:<16} rows/s {' '.join(f'{rate:.1f}' for rate in rates)}")
    ratios = [a / b for a, b in zip(*found.values(), strict=True)]
    print(f"ratio of each pair: median {statistics.median(ratios):.2f}, least {min(ratios):.2f}")


if __name__ == "__main__":
    main()
