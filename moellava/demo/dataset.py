"""The demo's images and questions as files that `moellava train` reads: `write_dataset`."""

import json
import random
from collections.abc import Iterable
from itertools import groupby
from pathlib import Path
from typing import TypedDict

from moellava.demo.images import load_sources
from moellava.demo.questions import Example, make_examples
from moellava.storage.writing import write_text


class JsonRow(TypedDict, total=False):
    """A row in LLaVA's layout, and what the demo counts and shows by."""

    id: str
    image: str
    conversations: list[dict[str, str]]
    modality: str
    picture: str  # which picture or volume the crop is of


def write_dataset(
    folder: Path, *, num_train_crops: int = 64, num_held_out_crops: int = 12, seed: int = 0
) -> dict[str, Path]:
    """Write crops of the packages' images with questions about their modality.

    Args:
        folder: receives `images/` and the files below.
        num_train_crops, num_held_out_crops: per modality; the two parts share no pixel.
        seed: of crops and questions.

    Returns:
        JSON in LLaVA's layout. `captions`: an image and its modality, for stage 1; `train` and
        `held_out`: one question per row; `conversations`: the questions of `train` as turns about
        their image, in random order; `descriptions`: the same questions about a modality's name in
        place of an image, from which a toy language model learns to read, so that stage 1 finds
        what a published one brings.
    """
    sources = load_sources()
    train = make_examples(sources, "train", num_train_crops, seed)
    held_out = make_examples(sources, "held_out", num_held_out_crops, seed + 1)
    images = folder / "images"
    images.mkdir(parents=True, exist_ok=True)
    rng = random.Random(seed)
    groups = [
        _save_images(examples, images, name)
        for examples, name in ((train, "train"), (held_out, "held_out"))
    ]
    files = {
        "captions": [
            _row(name, name, [("Describe the image.", group[0].modality)])
            for name, group in groups[0]
        ],
        # In random order: after an answer that names the modality, the other questions need no
        # look at the image.
        "conversations": [
            _row(name, name, [(e.question, e.answer) for e in rng.sample(group, len(group))])
            for name, group in groups[0]
        ],
        "descriptions": [row for name, group in groups[0] for row in _descriptions(name, group)],
        "train": list(_questions(groups[0])),
        "held_out": list(_questions(groups[1])),
    }
    paths = {}
    for name, rows in files.items():
        paths[name] = folder / f"{name}.json"
        write_text(paths[name], json.dumps(rows, indent=1) + "\n")
    return paths


def _save_images(
    examples: list[Example], folder: Path, name: str
) -> list[tuple[str, list[Example]]]:
    """One PNG per crop; its name, and the examples about it."""
    groups = [list(group) for _, group in groupby(examples, key=lambda example: id(example.image))]
    named = [(f"{name}_{number:04}", group) for number, group in enumerate(groups)]
    for stem, group in named:
        group[0].image.save(folder / f"{stem}.png", compress_level=1)
    return named


def _questions(groups: Iterable[tuple[str, list[Example]]]) -> Iterable[JsonRow]:
    for name, group in groups:
        for number, example in enumerate(group):
            row = _row(f"{name}_{number}", name, [(example.question, example.answer)])
            yield {**row, "modality": example.modality, "picture": example.source}


def _descriptions(name: str, group: list[Example]) -> Iterable[JsonRow]:
    asked = [
        ("Describe the image.", group[0].modality),
        *((example.question, example.answer) for example in group),
    ]
    for number, (question, answer) in enumerate(asked):
        turns = [
            {"from": "human", "value": f"{group[0].modality}\n{question}"},
            {"from": "gpt", "value": answer},
        ]
        yield {"id": f"{name}_{number}", "conversations": turns}


def _row(row_id: str, image: str, turns: list[tuple[str, str]]) -> JsonRow:
    conversations = []
    for number, (question, answer) in enumerate(turns):
        mark = "<image>\n" if number == 0 else ""
        conversations += [
            {"from": "human", "value": mark + question},
            {"from": "gpt", "value": answer},
        ]
    return {"id": row_id, "image": f"{image}.png", "conversations": conversations}
