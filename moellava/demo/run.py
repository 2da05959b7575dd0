"""The demo from end to end: data, parts, training, reloading, questions about held-out images.

| name | what it does |
|---|---|
| `run_demo` | all of it; a `DemoResult` |
| `exchange_images` | the counter-proof's data |
| `majority_answers` | the baseline that never looks at an image |
"""

import json
import random
import shutil
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from moellava.data import Row, read_rows
from moellava.data.collate import ChatCollator
from moellava.demo.dataset import JsonRow, write_dataset
from moellava.demo.packages import require_packages
from moellava.demo.questions import corpus
from moellava.eval.metrics import is_exact_answer
from moellava.model.builder_enhanced import LoadedModel, load_pretrained_model
from moellava.storage.writing import write_json, write_text
from moellava.testing import write_biomedclip, write_tinyllama
from moellava.train import Recipe, load_recipe, train
from moellava.train.answers import answer_rows
from moellava.train.batches import build_collator

NUM_TRAIN_CROPS = 192  # per modality
NUM_HELD_OUT_CROPS = 12  # per modality
BATCH_SIZE = 8  # images; each brings three questions
MAX_NEW_TOKENS = 12
ANSWERS_FILE = "answers.jsonl"


@dataclass(frozen=True)
class HeldOutAnswer:
    """A question about a held-out crop, what is right, and what the model says."""

    row: Row  # with the crop's file; its `extra` has `modality` and `picture`
    answer: str
    blank_answer: str  # with a grey image in place of the crop
    majority_answer: str  # what its question had most often in training

    @property
    def truth(self) -> str:
        """The right answer."""
        return self.row.answer or ""

    @property
    def is_right(self) -> bool:
        """Whether the model gave it."""
        return is_exact_answer(self.answer, self.truth)


@dataclass(frozen=True)
class DemoResult:
    """What the demo saw; accuracies are shares of the held-out questions, 0..1."""

    checkpoint: Path
    answers: Sequence[HeldOutAnswer]
    accuracy: float
    blank_accuracy: float  # the same model and questions, with a grey image in place of each
    majority_accuracy: float  # always the answer that its question had most often in training


def run_demo(
    folder: Path,
    *,
    num_steps: int,
    seed: int,
    show_progress: bool = True,
    shuffle_images: bool = False,
    tiles: int | None = None,
) -> DemoResult:
    """Train a toy on real images and answer questions about crops that it has not seen.

    Args:
        folder: receives `data/`, `parts/` (untrained encoder and language model), `training/`,
            `checkpoint/` and `answers.jsonl`, a line for each held-out question.
        num_steps: optimizer steps, each on 8 images with three questions.
        seed: of weights, crops, questions and data order.
        show_progress: a progress bar while training.
        shuffle_images: train on questions whose images were exchanged at random. A model that
            still beats the baselines then does not do so by looking.
        tiles: see crops larger than the toy's 160 pixels as at most so many tiles, too.
    """
    require_packages()
    files = write_dataset(
        folder / "data",
        num_train_crops=NUM_TRAIN_CROPS,
        num_held_out_crops=NUM_HELD_OUT_CROPS,
        seed=seed,
    )
    if shuffle_images:
        rows = json.loads(files["conversations"].read_text(encoding="utf-8"))
        write_json(files["conversations"], exchange_images(rows, seed))
    recipe = demo_recipe(
        folder, files["conversations"], num_steps=num_steps, seed=seed, tiles=tiles
    )
    shutil.rmtree(folder / "training", ignore_errors=True)  # an earlier demo's
    trained = train(recipe, show_progress=show_progress).model_folder
    checkpoint = folder / "checkpoint"
    shutil.rmtree(checkpoint, ignore_errors=True)
    trained.rename(checkpoint)

    images = folder / "data" / "images"
    held_out = read_rows(files["held_out"], images=images)
    majority = majority_answers(read_rows(files["train"], images=images), held_out)
    answers = _ask(load_pretrained_model(checkpoint), recipe, held_out, majority)
    _write_answers(answers, folder / ANSWERS_FILE)
    return DemoResult(
        checkpoint,
        answers,
        accuracy=share_right((item.answer, item.truth) for item in answers),
        blank_accuracy=share_right((item.blank_answer, item.truth) for item in answers),
        majority_accuracy=share_right((item.majority_answer, item.truth) for item in answers),
    )


def demo_recipe(
    folder: Path, rows: Path, *, num_steps: int, seed: int, tiles: int | None = None
) -> Recipe:
    """Untrained parts in the files of the real ones, joined to a mixture that learns as a whole."""
    tower = write_biomedclip(
        folder / "parts" / "biomedclip_toy", vision="test_vit", image_size=160, seed=seed
    )
    language_model = write_tinyllama(
        folder / "parts" / "tinyllama_toy",
        hidden_size=128,
        intermediate_size=256,
        vocab_size=800,
        corpus=corpus(),
        seed=seed,
    )
    return load_recipe(
        {
            "stage": "experts",
            "after": "any",
            "output_dir": str(folder / "training"),
            "model": {
                "model_name_or_path": str(language_model),
                "mm_vision_tower": str(tower),
                **({} if tiles is None else {"tiling": {"max_tiles": tiles}}),
            },
            "trainable": ["vision_tower", "projector", "language_model"],
            "data": {
                "train": str(rows),
                "images": str(rows.parent / "images"),
                "num_workers": 0,
                # Answers have one or two words: rows of one length would be rows of one answer.
                "group_by_length": False,
            },
            "optim": {
                "learning_rate": 1e-3,
                "batch_size": BATCH_SIZE,
                "per_device_batch_size": BATCH_SIZE,
                "max_steps": num_steps,
                "warmup": 0.05,
                "weight_decay": 0.01,
                "precision": "fp32",
            },
            "logging": {"every": max(num_steps // 10, 1), "report_to": []},
            "saving": {"every": num_steps, "keep": 1},
            "seed": seed,
        }
    )


def exchange_images(rows: Sequence[JsonRow], seed: int) -> list[JsonRow]:
    """The same questions and answers, each image exchanged for another drawn at random."""
    images = [row["image"] for row in rows]
    shuffled = random.Random(seed).sample(images, len(images))
    return [{**row, "image": image} for row, image in zip(rows, shuffled, strict=True)]


def majority_answers(train_rows: Iterable[Row], held_out: Iterable[Row]) -> list[str]:
    """For each held-out question, the answer that the same question had most often in training."""
    overall: Counter[str] = Counter()
    per_question: dict[str, Counter[str]] = {}
    for row in train_rows:
        overall[row.answer or ""] += 1
        per_question.setdefault(row.question, Counter())[row.answer or ""] += 1
    return [per_question.get(row.question, overall).most_common(1)[0][0] for row in held_out]


def share_right(answered: Iterable[tuple[str, str]]) -> float:
    """Share of the (answer, truth) pairs that are exact."""
    right = [is_exact_answer(answer, truth) for answer, truth in answered]
    return sum(right) / len(right)


def _ask(
    loaded: LoadedModel, recipe: Recipe, rows: Sequence[Row], majority: Sequence[str]
) -> list[HeldOutAnswer]:
    collator = build_collator(recipe, loaded.processor)
    answers = _answers(loaded, rows, collator)
    collator.load_image = lambda image: Image.new("RGB", (64, 64), (127, 127, 127))
    blank = _answers(loaded, rows, collator)
    return [
        HeldOutAnswer(row, answer, blank_answer, most_frequent)
        for row, answer, blank_answer, most_frequent in zip(
            rows, answers, blank, majority, strict=True
        )
    ]


def _answers(loaded: LoadedModel, rows: Sequence[Row], collator: ChatCollator) -> list[str]:
    found = answer_rows(loaded, rows, collator, max_new_tokens=MAX_NEW_TOKENS, batch_size=24)
    return [item.answer for item in found]


def _write_answers(answers: Iterable[HeldOutAnswer], path: Path) -> None:
    lines = [
        json.dumps(
            {
                "id": item.row.id,
                "modality": item.row.extra["modality"],
                "picture": item.row.extra["picture"],
                "question": item.row.question,
                "answer": item.answer,
                "truth": item.truth,
                "is_right": item.is_right,
                "answer_to_a_blank_image": item.blank_answer,
            }
        )
        for item in answers
    ]
    write_text(path, "\n".join(lines) + "\n")
