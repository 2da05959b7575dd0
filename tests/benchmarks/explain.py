"""What an explanation costs, and whether its maps deserve belief.

    python -m tests.benchmarks.explain cost [--layers 22]     # real width, random weights
    python -m tests.benchmarks.explain honesty --out FOLDER   # trains a toy: minutes
    python -m tests.benchmarks.explain honesty --out FOLDER --checkpoint FOLDER/toy/checkpoint

`honesty` pastes discs of a pattern onto real images and trains a toy to name the pattern, so that
the place of the answer is known by construction. A pattern keeps the mean of what it covers, so
that blanking with the mean colour leaves no trace of it, as it would of a coloured disc. Then, on
images that it has not seen: the pointing game, deletion and insertion curves against random orders,
and maps under randomised weights.
"""

import argparse
import os
import statistics
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from moellava.data.collate import ChatCollator
from moellava.demo.images import load_sources, sample_crops
from moellava.demo.questions import corpus
from moellava.explain import Explanation, explain
from moellava.explain.checks import curve, order_of, randomised_layers, rank_correlation
from moellava.explain.effects import AnswerScorer, ablation_map
from moellava.explain.recording import recording_bytes
from moellava.explain.words import points_inside
from moellava.model.builder_enhanced import LoadedModel, load_pretrained_model
from moellava.testing import write_biomedclip, write_tinyllama

ASKED = "Which pattern has the lesion?"
CONTRAST = 110  # grey levels above and below what the pattern covers
SIDE = 96  # pixels of the toys' images; 6 x 6 patches
PATCH = 16
BLOCKS, COARSE = (6, 6), (3, 3)
COARSE_NAME = "ablation, blocks of 2 x 2 patches"
KINDS = ("attention", "rollout", "ablation", "gradient")
NEW_TOKENS = (4, 32)  # a short answer and a sentence
NUM_ORDERS = 5  # random orders that a map's order is compared with


@dataclass(frozen=True)
class Lesion:
    """A picture with a disc pasted onto it."""

    image: Image.Image
    pattern: str
    mask: np.ndarray  # (H, W) bool, the disc and half a patch around it


def lesions(split: str, num_per_modality: int, seed: int) -> Iterator[Lesion]:
    """Discs of random place, size and pattern on crops of real images."""
    rng = np.random.default_rng(seed)
    for _, crop in sample_crops(load_sources(), split, num_per_modality, seed):
        yield paste_disc(crop.convert("L").resize((SIDE, SIDE), Image.Resampling.BICUBIC), rng)


def paste_disc(picture: Image.Image, rng: np.random.Generator) -> Lesion:
    """A grey picture with a patterned disc of about the size of a patch."""
    side = picture.width
    pattern = str(rng.choice(list(PATTERNS)))
    radius = int(rng.integers(9, 14))
    x, y = rng.integers(radius, side - radius, 2)
    columns, rows = np.meshgrid(np.arange(side), np.arange(side))
    distance = np.hypot(columns - x, rows - y)
    levels = np.asarray(picture, dtype=np.float32)
    signs = np.where(PATTERNS[pattern](columns // 2, rows // 2) % 2, CONTRAST, -CONTRAST)
    is_disc = distance <= radius
    middle = np.clip(levels[is_disc].mean(), CONTRAST, 255 - CONTRAST)
    image = Image.fromarray(np.where(is_disc, middle + signs, levels).astype(np.uint8))
    return Lesion(image.convert("RGB"), pattern, distance <= radius + PATCH / 2)


PATTERNS: dict[str, Callable[[np.ndarray, np.ndarray], np.ndarray]] = {
    "rows": lambda columns, rows: rows,
    "bars": lambda columns, rows: columns,
    "checks": lambda columns, rows: columns + rows,
}


# ---- cost, at real size ----


def bench_cost(folder: Path, num_layers: int, rounds: int) -> None:
    """`explain` with attention against `answer`: time, and memory beyond it."""
    from tests.benchmarks.encoders import alternate

    loaded = real_width_model(folder, num_layers)
    noise = np.random.default_rng(0).integers(0, 256, (512, 512, 3), dtype=np.uint8)
    image, question = Image.fromarray(noise), "What modality is this? Answer the question."
    memory: dict[tuple[str, int], float] = {}

    def measured(name: str, num_new: int) -> Callable[[], object]:
        options: dict[str, Any] = {"max_new_tokens": num_new, "min_new_tokens": num_new}
        runs: dict[str, Callable[[], object]] = {
            "answer": lambda: loaded.answer(image, question, **options),
            "explain, no blank image": lambda: loaded.explain(
                image, question, blank=False, **options
            ),
            "explain": lambda: loaded.explain(image, question, **options),
        }

        def with_peak() -> object:
            Path("/proc/self/clear_refs").write_text("5")  # the peak starts from here
            before = status("VmRSS")
            result = runs[name]()
            taken = status("VmHWM") - before
            memory[name, num_new] = taken  # of the last round: the first touches all weights
            return result

        return with_peak

    names = ("answer", "explain, no blank image", "explain")
    cases = {f"{name} {num}": measured(name, num) for num in NEW_TOKENS for name in names}
    seconds = alternate(cases, rounds)
    print(
        f"| {num_layers} layers, bfloat16 | new tokens | seconds | ratio | MiB beyond it | bound |"
    )
    print("|---|---|---|---|---|---|")
    for num_new in NEW_TOKENS:
        base = statistics.median(seconds[f"answer {num_new}"])
        config = loaded.model.config.text_config
        bound = recording_bytes(config, 240 + num_new, num_new, 196) / 2**20
        for name in names:
            own = seconds[f"{name} {num_new}"]
            spread = f"{statistics.median(own):.2f} ({min(own):.2f}-{max(own):.2f})"
            extra = memory[name, num_new] - memory["answer", num_new]
            ratio = statistics.median(own) / base
            print(f"| {name} | {num_new} | {spread} | {ratio:.2f} | {extra:.0f} | {bound:.0f} |")


def real_width_model(folder: Path, num_layers: int) -> LoadedModel:
    """BiomedCLIP's ViT-B/16 and TinyLlama's width, with random weights."""
    language_model = write_tinyllama(
        folder / "tinyllama",
        hidden_size=2048,
        intermediate_size=5632,
        num_hidden_layers=num_layers,
        num_attention_heads=32,
        num_key_value_heads=4,
        dtype=torch.bfloat16,
    )
    tower = write_biomedclip(folder / "biomedclip")
    parts = {"model_name_or_path": str(language_model), "mm_vision_tower": str(tower)}
    return load_pretrained_model(parts, seed=0)


def status(name: str) -> float:
    """A line of this process's memory, in MiB."""
    with open("/proc/self/status") as lines:
        return next(int(line.split()[1]) for line in lines if line.startswith(name)) / 2**10


# ---- honesty, on toys ----


def train_toy(folder: Path, train_set: Sequence[Lesion], num_steps: int) -> LoadedModel:
    """A toy that names the pattern of the disc."""
    side = train_set[0].image.width
    tower = write_biomedclip(folder / "biomedclip_toy", vision="test_vit", image_size=side)
    words = [*corpus(), ASKED, *PATTERNS]
    language_model = write_tinyllama(
        folder / "tinyllama_toy",
        hidden_size=128,
        intermediate_size=256,
        vocab_size=800,
        corpus=words,
    )
    parts = {"model_name_or_path": str(language_model), "mm_vision_tower": str(tower)}
    loaded = load_pretrained_model(parts, dtype="float32", seed=0)
    collate = ChatCollator(loaded.processor)
    batches = [collate(rows) for rows in in_batches([as_row(one) for one in train_set])]
    train(loaded.model, num_steps, lambda step: loaded.model(**batches[step % len(batches)]).loss)
    return loaded


def as_row(lesion: Lesion) -> dict[str, Any]:
    """A conversation as `ChatCollator` takes it."""
    content = [{"type": "image", "image": lesion.image}, {"type": "text", "text": ASKED}]
    return {
        "messages": [
            {"role": "user", "content": content},
            {"role": "assistant", "content": lesion.pattern},
        ]
    }


def in_batches(items: Sequence[Any], size: int = 16) -> list[list[Any]]:
    """In a random order, always the same."""
    order = np.random.default_rng(0).permutation(len(items))
    return [[items[i] for i in order[start : start + size]] for start in range(0, len(items), size)]


def train(
    model: torch.nn.Module,
    num_steps: int,
    loss_of: Callable[[int], torch.Tensor],
    peak: float = 2e-3,
) -> None:
    """AdamW with a cosine; prints the loss ten times."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=peak, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, peak, num_steps, pct_start=0.05)
    model.train()
    for step in range(num_steps):
        optimizer.zero_grad()
        loss = loss_of(step)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if step % max(1, num_steps // 10) == 0:
            print(f"  step {step}: loss {loss.item():.3f}", flush=True)
    model.eval()


def bench_honesty(folder: Path, checkpoint: Path | None, num_steps: int, num_images: int) -> None:
    """All checks of one toy, as tables."""
    if checkpoint is None:
        loaded = train_toy(folder / "toy", list(lesions("train", 80, 0)), num_steps)
        loaded.model.save_pretrained(folder / "toy" / "checkpoint")
        loaded.processor.save_pretrained(folder / "toy" / "checkpoint")
    else:
        loaded = load_pretrained_model(str(checkpoint))
    held_out = list(lesions("held_out", -(-num_images // 6), 1))[:num_images]
    pairs = [
        (lesion, explain(loaded, lesion.image, ASKED, gradient=True, ablation=True, blocks=BLOCKS))
        for lesion in held_out
    ]
    right = [(lesion, one) for lesion, one in pairs if one.answer == lesion.pattern]
    print(
        f"\n{len(right)} of {len(pairs)} held-out images answered right; only these count below.\n"
    )
    coarse = [coarse_ablation(loaded, lesion) for lesion, _ in right]
    print_pointing(right, coarse)
    print_curves(loaded, right[:24], coarse)
    print_randomised(loaded, right[:12])
    example, explanation = right[0]
    example.image.save(folder / "lesion.png")
    for kind in KINDS:
        explanation.draw_overlay(folder / f"lesion_{kind}.png", kind=kind)


def coarse_ablation(loaded: LoadedModel, lesion: Lesion) -> np.ndarray:
    """The ablation of blocks of 2 x 2 patches, (3, 3)."""
    scorer, pixels = scorer_of(loaded, lesion)
    return ablation_map(scorer, pixels, COARSE).sum(0)[0]


def print_pointing(
    right: Sequence[tuple[Lesion, Explanation]], coarse: Sequence[np.ndarray]
) -> None:
    """How often the highest patch of a map lies on the disc, and of the blank image's map."""
    print("| map | highest patch on the lesion | of the blank image's map |\n|---|---|---|")
    for kind in KINDS:
        hits = [hit(one.map(kind), one, lesion) for lesion, one in right]
        blank = "-"
        if kind in ("attention", "rollout"):
            found = [hit(one.map(kind, blank=True), one, lesion) for lesion, one in right]
            blank = f"{np.mean(found):.2f}"
        print(f"| {kind} | {interval(hits)} | {blank} |")
    found = [hit(values, one, lesion) for values, (lesion, one) in zip(coarse, right, strict=True)]
    print(f"| {COARSE_NAME} | {interval(found)} | - |")
    chance = np.mean([lesion.mask.mean() for lesion, _ in right])
    print(f"| a random place | {chance:.2f} | |\n")
    layers, heads = right[0][1].attention.shape[:2]
    scores = {
        (layer, head): np.mean(
            [hit(one.map(layer=layer, head=head), one, lesion) for lesion, one in right]
        )
        for layer in range(layers)
        for head in range(heads)
    }
    best = max(scores, key=lambda place: scores[place])
    print(
        f"The best single head, layer {best[0]} head {best[1]} (chosen on these images, so too "
        f"good): {scores[best]:.2f}; the worst: {min(scores.values()):.2f}.\n"
    )


def hit(values: np.ndarray, explanation: Explanation, lesion: Lesion) -> bool:
    """One round of the pointing game."""
    return points_inside(values, explanation.frames[0], lesion.mask)


def interval(hits: Sequence[bool]) -> str:
    """A share with its Wilson interval."""
    n, share, z = len(hits), float(np.mean(hits)), 1.96
    middle = (share + z**2 / (2 * n)) / (1 + z**2 / n)
    half = z * np.sqrt(share * (1 - share) / n + z**2 / (4 * n**2)) / (1 + z**2 / n)
    return f"{share:.2f} ({middle - half:.2f} to {middle + half:.2f})"


def print_curves(
    loaded: LoadedModel,
    right: Sequence[tuple[Lesion, Explanation]],
    coarse: Sequence[np.ndarray],
) -> None:
    """Mean probability of the answer along the curves: deletion low and insertion high is good."""
    areas: dict[str, list[tuple[float, float]]] = defaultdict(list)
    rng = np.random.default_rng(0)
    for (lesion, one), large in zip(right, coarse, strict=False):
        scorer, pixels = scorer_of(loaded, lesion)
        orders = {kind: [order_of(on_blocks(one.map(kind)))] for kind in KINDS}
        orders[COARSE_NAME] = [order_of(np.kron(large, np.ones((2, 2), dtype=np.float32)))]
        size = BLOCKS[0] * BLOCKS[1]
        orders["random order"] = [rng.permutation(size) for _ in range(NUM_ORDERS)]
        for name, several in orders.items():
            for order in several:
                deleted, inserted = (
                    float(np.exp(curve(scorer, pixels, order, BLOCKS, insert=insert)).mean())
                    for insert in (False, True)
                )
                areas[name].append((deleted, inserted))
    print(f"| order, {len(right)} images | deletion, lower is better | insertion, higher |")
    print("|---|---|---|")
    for name, found in areas.items():
        deleted, inserted = np.mean(found, axis=0)
        print(f"| {name} | {deleted:.2f} | {inserted:.2f} |")
    print()


def scorer_of(loaded: LoadedModel, lesion: Lesion) -> tuple[AnswerScorer, torch.Tensor]:
    """The log-probability of the pattern, for any pixels."""
    batch = ChatCollator(loaded.processor)([as_row(lesion)])
    answer = (batch["labels"][0] != -100).nonzero()[:, 0]
    specials = set(loaded.tokenizer.all_special_ids)
    end = int(answer[-1]) + (batch["input_ids"][0, answer[-1]].item() not in specials)
    return AnswerScorer(loaded.model, batch["input_ids"][:, :end], int(answer[0])), batch[
        "pixel_values"
    ]


def on_blocks(values: np.ndarray) -> np.ndarray:
    """A map of patches as the mean over blocks."""
    rows, columns = values.shape[0] // BLOCKS[0], values.shape[1] // BLOCKS[1]
    return values.reshape(BLOCKS[0], rows, BLOCKS[1], columns).mean((1, 3))


def print_randomised(loaded: LoadedModel, right: Sequence[tuple[Lesion, Explanation]]) -> None:
    """Rank correlation of each map with that of the same model with shuffled last layers."""
    num_layers = loaded.model.config.text_config.num_hidden_layers
    counts = [1, num_layers // 2, num_layers]
    print(f"| map | {' | '.join(f'last {count} layers shuffled' for count in counts)} |")
    print("|---|" + "---|" * len(counts))
    found: dict[str, list[list[float]]] = {kind: [] for kind in KINDS}
    for count in counts:
        with randomised_layers(loaded.model, count):
            others = [
                explain(
                    loaded,
                    lesion.image,
                    ASKED,
                    answer=lesion.pattern,
                    gradient=True,
                    ablation=True,
                    blocks=BLOCKS,
                    blank=False,
                )
                for lesion, _ in right
            ]
        for kind in KINDS:
            found[kind].append(
                [
                    rank_correlation(one.map(kind), other.map(kind))
                    for (_, one), other in zip(right, others, strict=True)
                ]
            )
    for kind, columns in found.items():
        print(f"| {kind} | {' | '.join(f'{np.mean(values):.2f}' for values in columns)} |")
    print()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("what", choices=("cost", "honesty"))
    parser.add_argument("--out", type=Path, default=Path("explain-benchmark"))
    parser.add_argument("--checkpoint", type=Path)
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--images", type=int, default=60)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--layers", type=int, default=22, help="of the language model, for cost")
    arguments = parser.parse_args()
    torch.manual_seed(0)
    start = time.perf_counter()
    arguments.out.mkdir(parents=True, exist_ok=True)
    if arguments.what == "cost":
        with tempfile.TemporaryDirectory() as name:
            bench_cost(Path(name), arguments.layers, arguments.rounds)
    else:
        bench_honesty(arguments.out, arguments.checkpoint, arguments.steps, arguments.images)
    threads, load = torch.get_num_threads(), os.getloadavg()[0]
    print(f"\n{time.perf_counter() - start:.0f} s, {threads} threads, load {load:.1f}")


if __name__ == "__main__":
    main()
