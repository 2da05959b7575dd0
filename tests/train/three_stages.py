"""The three stages in sequence on the demo's real images; docs/training.md has what this printed.

python -m tests.train.three_stages [SEED ...] [--out FOLDER]
"""

import argparse
import json
import statistics
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from moellava.data import read_rows
from moellava.demo.dataset import write_dataset
from moellava.demo.parts import write_trained_parts
from moellava.model.builder_enhanced import load_pretrained_model
from moellava.train import load_recipe, train
from moellava.train.answers import answer_rows, share_exact
from moellava.train.batches import build_collator

# Recipe, optimizer steps, learning rate: small models take larger rates than the papers'.
STAGES = (("stage1_align", 60, 2e-3), ("stage2_tune", 40, 3e-4), ("stage3_experts", 150, 1.5e-3))
COMMON = (
    "optim.batch_size=16",
    "optim.per_device_batch_size=16",
    "optim.precision=fp32",
    "optim.activation_checkpointing=false",
    "data.num_workers=0",
    "logging.report_to=[]",
    "evaluation.every=1000",
    "evaluation.num_answers=1000",
    "evaluation.max_new_tokens=8",
    "data.chat_template=null",  # the toy language model has only read chats
    "data.group_by_length=false",  # answers of one or two words: equal lengths are equal answers
)
MIXTURE = "moe.config.moe_layers=dense"  # the toy has four layers


@dataclass(frozen=True)
class Seen:
    """Of one seed, in the order untrained, stage 1, 2, 3; accuracies are shares, 0..1."""

    accuracies: list[float]
    losses: list[float]
    seconds: list[float]
    blank: float  # accuracy of the last model, with a grey image in place of each


def run_three_stages(
    folder: Path,
    *,
    seed: int = 0,
    num_held_out_crops: int = 24,
    share: float = 1.0,
    num_stages: int = 3,
) -> Seen:
    """Stage 1 on captions, 2 on conversations about a quarter of the images, 3 on all of them.

    `share` shortens everything that is trained, the toy parts included.
    """
    files = write_dataset(
        folder / "data", num_train_crops=96, num_held_out_crops=num_held_out_crops, seed=seed
    )
    parts = write_trained_parts(
        folder / "parts",
        files,
        tower_steps=round(150 * share),
        text_steps=round(250 * share),
        seed=seed,
    )
    quarter = folder / "data" / "quarter.json"
    quarter.write_text(json.dumps(json.loads(files["conversations"].read_text())[::4]))
    starts = (
        [f"model.{key}={value}" for key, value in parts.items()],
        *([f"start_from={folder / name}"] for name, _, _ in STAGES),
    )
    accuracies, losses, seconds = [], [], [0.0]
    for (name, steps, rate), start, data in zip(
        STAGES[:num_stages],
        starts,
        (files["captions"], quarter, files["conversations"]),
        strict=False,
    ):
        began = time.perf_counter()
        recipe = load_recipe(
            name,
            [
                *COMMON,
                *start,
                f"seed={seed}",
                f"output_dir={folder / name}",
                f"data.train={data}",
                f"data.images={folder / 'data' / 'images'}",
                f"data.evaluation={files['held_out']}",
                f"data.features={folder / 'features' / name}",
                f"optim.max_steps={round(steps * share)}",
                f"optim.learning_rate={rate}",
                *([MIXTURE] if name == "stage3_experts" else []),
            ],
        )
        log = train(recipe, show_progress=False).log
        seconds.append(time.perf_counter() - began)
        for key, kept in (("eval_answers_exact", accuracies), ("eval_loss", losses)):
            found = [entry[key] for entry in log if key in entry]
            kept += (
                found if name == "stage1_align" else found[1:]
            )  # a stage begins where the one before ended
    return Seen(
        accuracies, losses, seconds, blank_accuracy(folder / name / "model", files["held_out"])
    )


def blank_accuracy(model: Path, held_out: Path) -> float:
    loaded = load_pretrained_model(model, dtype="float32")
    collator = build_collator(
        load_recipe("stage3_experts", ["data.chat_template=null"]), loaded.processor
    )
    collator.load_image = lambda image: Image.new("RGB", (64, 64), (127, 127, 127))
    rows = read_rows(str(held_out), images=held_out.parent / "images")
    return share_exact(answer_rows(loaded, rows[:], collator, max_new_tokens=8, batch_size=48))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("seeds", nargs="*", type=int, default=[0, 1, 2])
    parser.add_argument("--out", type=Path, help="keep the runs here")
    arguments = parser.parse_args()
    found = []
    for seed in arguments.seeds:
        with tempfile.TemporaryDirectory() as scratch:
            seen = run_three_stages((arguments.out or Path(scratch)) / str(seed), seed=seed)
        print(
            seed,
            *(f"{100 * share:.1f}" for share in (*seen.accuracies, seen.blank)),
            sep=" | ",
            flush=True,
        )
        print(
            "  losses",
            *(f"{loss:.3f}" for loss in seen.losses),
            "seconds",
            *map(round, seen.seconds),
            flush=True,
        )
        found.append((*seen.accuracies, seen.blank))
    print(
        "mean",
        *(f"{100 * statistics.mean(shares):.1f}" for shares in zip(*found, strict=True)),
        sep=" | ",
    )


if __name__ == "__main__":
    main()
