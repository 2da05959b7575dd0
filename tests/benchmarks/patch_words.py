"""Whether a word points at its thing: real pictures with a mask, and a toy CLIP trained here.

    python -m tests.benchmarks.patch_words --out FOLDER [--steps 300] [--images 60]

Trained weights of a CLIP cannot be had offline, so a toy (6 x 6 patches, 4 blocks) learns from crops
of three real pictures which sentence belongs to which crop. It is never told a place. The pictures'
other halves, which it has not seen, are then asked: does the word's highest patch lie on the thing?
What the toy scores says how the method behaves, and nothing about BiomedCLIP's weights.
"""

import argparse
import os
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from moellava.encoders import BiomedClipEncoder
from moellava.explain.frames import measure_frame
from moellava.explain.words import draw_words, points_inside, text_contrast
from moellava.testing import write_biomedbert, write_biomedclip
from tests.benchmarks.explain import interval, train

SIDE = 96  # pixels of the toy's input
WINDOW = 96  # pixels of a picture that is asked about


@dataclass(frozen=True)
class Thing:
    """One picture and where the thing is that a word names."""

    word: str
    other: str  # what a crop without it shows
    pixels: np.ndarray  # (H, W, 3) uint8
    mask: np.ndarray  # (H, W) bool

    def half(self, split: str) -> "Thing":
        """The left 55 % for training, the rest to ask about."""
        middle = int(0.55 * self.mask.shape[1])
        part = slice(0, middle) if split == "train" else slice(middle, None)
        return Thing(self.word, self.other, self.pixels[:, part], self.mask[:, part])


def things() -> list[Thing]:
    """Nuclei in stained tissue, vessels of a retina, the brain in MNI152."""
    from nilearn.datasets import load_mni152_brain_mask, load_mni152_template
    from skimage import color, data, filters

    tissue = data.immunohistochemistry()
    stain = filters.gaussian(color.rgb2hed(tissue)[..., 0], 1.5)
    retina = data.retina()[250:-250, 250:-250]
    ridges = filters.sato(filters.gaussian(retina[..., 1], 1), sigmas=[3, 5], black_ridges=True)
    volume = load_mni152_template(resolution=1).get_fdata()
    is_brain = load_mni152_brain_mask(resolution=1).get_fdata() > 0
    slices = [np.rot90(volume[:, :, z]) for z in range(40, 130, 15)]
    brain = (np.clip(np.hstack(slices), 0, 1) * 255).astype(np.uint8)
    return [
        Thing("a nucleus", "stroma", tissue, stain > filters.threshold_otsu(stain)),
        Thing("a vessel", "the retina", retina, ridges > filters.threshold_otsu(ridges)),
        Thing(
            "the brain",
            "air",
            np.repeat(brain[..., None], 3, axis=2),
            np.hstack([np.rot90(is_brain[:, :, z]) for z in range(40, 130, 15)]),
        ),
    ]


def crops(thing: Thing, rng: np.random.Generator) -> Iterator[tuple[Image.Image, str]]:
    """Crops of any size with what they show: mostly the thing, or hardly any of it."""
    height, width = thing.mask.shape
    while True:
        side = int(rng.integers(16, WINDOW + 1))
        top, left = rng.integers(height - side + 1), rng.integers(width - side + 1)
        place = (slice(top, top + side), slice(left, left + side))
        share = thing.mask[place].mean()
        word = thing.word if share > 0.3 else thing.other if share < 0.03 else None
        if word is not None and rng.random() < (1.0 if word == thing.word else 0.3):
            yield Image.fromarray(thing.pixels[place]).resize((SIDE, SIDE)), word


def windows(thing: Thing, count: int, rng: np.random.Generator) -> Iterator[Thing]:
    """Windows of the picture in which the thing and something else can be seen."""
    height, width = thing.mask.shape
    while count:
        top, left = rng.integers(height - WINDOW + 1), rng.integers(width - WINDOW + 1)
        place = (slice(top, top + WINDOW), slice(left, left + WINDOW))
        if 0.05 < thing.mask[place].mean() < 0.6:
            count -= 1
            yield Thing(thing.word, thing.other, thing.pixels[place], thing.mask[place])


def make_encoder(folder: Path) -> BiomedClipEncoder:
    """A toy CLIP with random weights."""
    source = write_biomedclip(folder / "clip_toy", vision="test_vit", image_size=SIDE)
    text_config = write_biomedbert(folder / "biomedbert_toy") / "config.json"
    (source / "text_config.json").write_bytes(text_config.read_bytes())
    return BiomedClipEncoder.from_pretrained(str(source), load_text=True)


def train_clip(
    encoder: BiomedClipEncoder, every: Sequence[Thing], num_steps: int, num_crops: int = 400
) -> None:
    """Each crop against all sentences: a softmax over the texts."""
    rng = np.random.default_rng(0)
    pairs = [
        pair
        for thing in every
        for pair, _ in zip(crops(thing.half("train"), rng), range(num_crops), strict=False)
    ]
    texts = sentences(every)
    pixels = encoder.image_processor([image for image, _ in pairs], return_tensors="pt")
    labels = torch.tensor([texts.index(word) for _, word in pairs])
    ids = encoder.tokenizer(texts)
    generator = torch.Generator().manual_seed(0)

    def loss_of(step: int) -> torch.Tensor:
        batch = torch.randint(len(labels), (32,), generator=generator)
        seen = pixels["pixel_values"][batch]
        if step % 2:
            seen = seen.flip(-1)
        logits = 10 * encoder.visual_vectors(seen) @ encoder.text(ids).T
        return torch.nn.functional.cross_entropy(logits, labels[batch])

    train(encoder, num_steps, loss_of, peak=7e-4)


def sentences(every: Sequence[Thing]) -> list[str]:
    """What crops are told apart by."""
    return [text for thing in every for text in (thing.word, thing.other)]


def print_pointing(
    encoder: BiomedClipEncoder, untrained: BiomedClipEncoder, thing: Thing, num_images: int
) -> None:
    """One row: how often the word's highest patch lies on the thing."""
    asked = list(windows(thing.half("held_out"), num_images, np.random.default_rng(1)))
    frame = measure_frame(encoder.image_processor, (WINDOW, WINDOW))
    texts = [thing.word, thing.other]
    columns = []
    for model, attention in ((encoder, "own"), (encoder, "value"), (untrained, "own")):
        hits = []
        for one in asked:
            image = Image.fromarray(one.pixels)
            maps = model.patch_similarity(image, texts, attention=attention).numpy()
            hits.append(points_inside(text_contrast(maps)[0], frame, one.mask))
        columns.append(interval(hits))
    chance = np.mean([one.mask.mean() for one in asked])
    print(f"| {thing.word} | {' | '.join(columns)} | {chance:.2f} |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("patch-words"))
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--images", type=int, default=60, help="windows of each picture")
    arguments = parser.parse_args()
    torch.manual_seed(0)
    start = time.perf_counter()
    arguments.out.mkdir(parents=True, exist_ok=True)
    every = things()
    encoder, untrained = (make_encoder(arguments.out / name) for name in ("trained", "untrained"))
    train_clip(encoder, every, arguments.steps)
    print("\n| word | own attention | value-value | random weights | a random place |")
    print("|---|---|---|---|---|")
    for thing in every:
        print_pointing(encoder, untrained, thing, arguments.images)
        example = next(windows(thing.half("held_out"), 1, np.random.default_rng(2)))
        name = thing.word.replace(" ", "_")
        image = Image.fromarray(example.pixels)
        image.save(arguments.out / f"{name}.png")
        Image.fromarray(example.mask).save(arguments.out / f"{name}_mask.png")
        for attention in ("own", "value"):
            draw_words(
                encoder,
                image,
                [thing.word, thing.other],
                attention=attention,
                path=arguments.out / f"{name}_{attention}.png",
            )
    threads, load = torch.get_num_threads(), os.getloadavg()[0]
    print(f"\n{time.perf_counter() - start:.0f} s, {threads} threads, load {load:.1f}")


if __name__ == "__main__":
    main()
