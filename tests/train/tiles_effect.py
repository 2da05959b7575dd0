"""What tiles are for: the answer is a thing that one view of the image is too coarse for.

python -m tests.train.tiles_effect [SEED ...] [--steps N]

A mark of fine lines is pasted into real medical images that are three times as large as what the
tower sees. The tower has been taught to see such lines at its own size. The rest of the model is
trained alike with and without tiles. docs/resolution.md has what this printed.
"""

import argparse
import json
import statistics
import tempfile
import time
from pathlib import Path

import numpy as np
import numpy.typing as npt
from PIL import Image

from moellava.data import read_rows
from moellava.demo.images import Source, load_sources
from moellava.demo.parts import teach_tower
from moellava.encoders import create_encoder
from moellava.model.builder_enhanced import load_pretrained_model
from moellava.testing import write_biomedclip, write_tinyllama
from moellava.train import load_recipe, train
from moellava.train.answers import answer_rows, share_exact
from moellava.train.batches import build_collator

# In pixels: of what the tower sees, of an image, of a mark, of a line and its gap.
VIEW, SIDE, MARK, PERIOD = 64, 192, 24, 6
QUESTION = "Do the lines of the mark run across or down?"
ANSWERS = ("across", "down")
TILING = {"max_tiles": 9}


def picture(
    sources: list[Source], split: str, answer: str, side: int, rng: np.random.Generator
) -> Image.Image:
    """A crop of a real image, and a mark at a random place; no mark for another answer."""
    source = sources[rng.integers(len(sources))]
    regions = source.train if split == "train" else source.held_out
    region = regions[rng.integers(len(regions))]
    shorter = min(region.shape[:2])
    crop = Image.fromarray(region[:shorter, :shorter]).resize((side, side))
    if answer in ANSWERS:
        left, top = rng.integers(0, side - MARK + 1, 2).tolist()
        crop.paste(Image.fromarray(_lines(answer)), (left, top))
    return crop


def _lines(answer: str) -> npt.NDArray[np.uint8]:
    line = np.where(np.arange(MARK) % PERIOD < PERIOD // 2, 255, 0).astype(np.uint8)
    lines = np.broadcast_to(line[:, None], (MARK, MARK))  # each row is of one grey
    return np.ascontiguousarray(lines if answer == "across" else lines.T)


def write_pictures(folder: Path, *, num_train: int, num_held_out: int, seed: int) -> None:
    """`train.json`, `held_out.json` and their images; as many of each answer."""
    rng, sources = np.random.default_rng(seed), load_sources()
    (folder / "images").mkdir(parents=True)
    for split, count in (("train", num_train), ("held_out", num_held_out)):
        rows = []
        for number in range(count):
            name, answer = f"{split}_{number:04}.png", ANSWERS[number % 2]
            image = picture(sources, split, answer, SIDE, rng)
            image.save(folder / "images" / name, compress_level=1)
            turns = [
                {"from": "human", "value": f"<image>\n{QUESTION}"},
                {"from": "gpt", "value": answer},
            ]
            rows.append({"id": name, "image": name, "conversations": turns})
        (folder / f"{split}.json").write_text(json.dumps(rows))


def write_parts(folder: Path, *, seed: int, tower_steps: int) -> dict[str, str]:
    """A tower that knows such lines at its own size, and an untrained language model."""
    untrained = write_biomedclip(
        folder / "untrained", vision="test_vit", image_size=VIEW, seed=seed
    )
    tower = create_encoder("biomedclip", str(untrained))
    rng, sources = np.random.default_rng(seed), load_sources()
    captions = [(*ANSWERS, "none")[number % 3] for number in range(1200)]
    captioned = [(picture(sources, "train", caption, VIEW, rng), caption) for caption in captions]
    teach_tower(tower, captioned, tower_steps, seed)
    tower.save_pretrained(folder / "tower")
    language_model = write_tinyllama(
        folder / "llama", hidden_size=128, intermediate_size=256, vocab_size=500,
        corpus=[QUESTION, *ANSWERS], seed=seed,
    )  # fmt: skip
    return {"model_name_or_path": str(language_model), "mm_vision_tower": str(folder / "tower")}


def held_out_accuracy(
    folder: Path, parts: dict[str, str], *, tiles: bool, steps: int, seed: int
) -> float:
    """Train projector and language model, and the share of right held-out answers."""
    recipe = load_recipe(
        {
            "stage": "experts",
            "after": "any",
            "output_dir": str(folder / f"run_{tiles}"),
            "model": {**parts, **({"tiling": TILING} if tiles else {})},
            "trainable": ["projector", "language_model"],
            "data": {
                "train": str(folder / "train.json"),
                "images": str(folder / "images"),
                "features": str(folder / f"features_{tiles}.safetensors"),
                "num_workers": 0,
                "group_by_length": False,
            },
            "optim": {
                "learning_rate": 1e-3, "batch_size": 16, "per_device_batch_size": 16,
                "max_steps": steps, "warmup": 0.05, "precision": "fp32",
            },
            "logging": {"every": 50, "report_to": []},
            "seed": seed,
        }
    )  # fmt: skip
    trained = train(recipe, show_progress=False)
    losses = [entry["loss"] for entry in trained.log if "loss" in entry]
    print("  losses", *(f"{loss:.3f}" for loss in losses), flush=True)
    loaded = load_pretrained_model(trained.model_folder, dtype="float32")
    rows = read_rows(folder / "held_out.json", images=folder / "images")
    collator = build_collator(recipe, loaded.processor)
    answers = answer_rows(loaded, rows[:], collator, max_new_tokens=4, batch_size=20)
    return share_exact(answers)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("seeds", nargs="*", type=int, default=[0, 1, 2])
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--tower-steps", type=int, default=400)
    parser.add_argument("--train", type=int, default=1000)
    arguments = parser.parse_args()
    found = []
    print("seed | one view | tiles | seconds of each")
    for seed in arguments.seeds:
        with tempfile.TemporaryDirectory() as scratch:
            folder = Path(scratch) / "data"
            write_pictures(folder, num_train=arguments.train, num_held_out=200, seed=seed)
            parts = write_parts(folder, seed=seed, tower_steps=arguments.tower_steps)
            shares, seconds = [], []
            for tiles in (False, True):
                began = time.perf_counter()
                shares.append(
                    held_out_accuracy(folder, parts, tiles=tiles, steps=arguments.steps, seed=seed)
                )
                seconds.append(time.perf_counter() - began)
        print(
            seed, *(f"{100 * share:.1f}" for share in shares), *map(round, seconds),
            sep=" | ", flush=True,
        )  # fmt: skip
        found.append(shares)
    means = (f"{100 * statistics.mean(shares):.1f}" for shares in zip(*found, strict=True))
    print("mean", *means, sep=" | ")


if __name__ == "__main__":
    main()
