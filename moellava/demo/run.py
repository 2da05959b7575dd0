"""The demo from end to end: parts, joining, training, saving, reloading, questions about held-out images."""

import importlib.util
import random
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from moellava.data.collate import ChatCollator
from moellava.demo.images import load_sources
from moellava.demo.questions import Example, corpus, make_examples
from moellava.eval.metrics import is_exact_answer
from moellava.model.builder_enhanced import LoadedModel, load_pretrained_model
from moellava.testing import write_biomedclip, write_tinyllama

NUM_TRAIN_CROPS = 192  # per modality
NUM_HELD_OUT_CROPS = 12  # per modality
BATCH_SIZE = 8  # images; each brings three questions


@dataclass(frozen=True)
class DemoResult:
    """What the demo saw; accuracies are shares of the held-out questions, 0..1."""

    checkpoint: Path
    examples: list[Example]
    answers: list[str]
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
) -> DemoResult:
    """Train a toy on real images and answer questions about crops that it has not seen.

    Args:
        folder: receives `parts/` (untrained encoder and language model), `checkpoint/` and training files.
        num_steps: optimizer steps, each on 8 images with three questions.
        seed: of weights, crops, questions and data order.
        show_progress: a progress bar while training.
        shuffle_images: train on questions whose images were exchanged at random. A model that still beats the
            baselines then does not do so by looking.
    """
    _require_packages()
    sources = load_sources()
    train = make_examples(sources, "train", NUM_TRAIN_CROPS, seed)
    held_out = make_examples(sources, "held_out", NUM_HELD_OUT_CROPS, seed + 1)
    if shuffle_images:
        train = exchange_images(train, seed)
    loaded = build_toy(folder / "parts", seed)
    _train(loaded, train, folder / "training", num_steps, seed, show_progress)

    checkpoint = folder / "checkpoint"
    loaded.model.save_pretrained(checkpoint)
    loaded.processor.save_pretrained(checkpoint)
    reloaded = load_pretrained_model(checkpoint)
    answers = answer_in_batches(reloaded, [example.image for example in held_out], held_out)
    blank = [Image.new("RGB", example.image.size, (127, 127, 127)) for example in held_out]
    blank_answers = answer_in_batches(reloaded, blank, held_out)
    return DemoResult(
        checkpoint,
        held_out,
        answers,
        accuracy=share_correct(held_out, answers),
        blank_accuracy=share_correct(held_out, blank_answers),
        majority_accuracy=share_correct(held_out, majority_answers(train, held_out)),
    )


def _require_packages() -> None:
    """Say what is missing before the training, not behind it."""
    packages = ("accelerate", "matplotlib", "nilearn", "pydicom", "skimage")
    if missing := [name for name in packages if importlib.util.find_spec(name) is None]:
        raise ImportError(
            f'The demo needs {", ".join(missing)}. Type: pip install "moellava[demo]"'
        )


def build_toy(parts: Path, seed: int) -> LoadedModel:
    """Untrained parts in the files of the real ones, joined by the call that joins the real ones."""
    tower = write_biomedclip(parts / "biomedclip_toy", vision="test_vit", image_size=160, seed=seed)
    language_model = write_tinyllama(
        parts / "tinyllama_toy",
        hidden_size=128,
        intermediate_size=256,
        vocab_size=800,
        corpus=corpus(),
        seed=seed,
    )
    return load_pretrained_model(
        {
            "model_name_or_path": str(language_model),
            "mm_vision_tower": str(tower),
            "mm_hidden_size": 64,
        },
        dtype="float32",
        seed=seed,
    )


def exchange_images(examples: Sequence[Example], seed: int) -> list[Example]:
    """The same questions and answers, each image's in the company of another image drawn at random."""
    images = list({id(example.image): example.image for example in examples}.values())
    shuffled = random.Random(seed).sample(images, len(images))
    other = {id(image): partner for image, partner in zip(images, shuffled, strict=True)}
    return [replace(example, image=other[id(example.image)]) for example in examples]


def share_correct(examples: Sequence[Example], answers: Sequence[str]) -> float:
    """Share of answers that are the expected word for word; case and a final period do not count."""
    pairs = zip(examples, answers, strict=True)
    return sum(is_exact_answer(answer, example.answer) for example, answer in pairs) / len(examples)


def majority_answers(train: Sequence[Example], held_out: Sequence[Example]) -> list[str]:
    """For each held-out question, the answer that the same question had most often in training."""
    overall = Counter(example.answer for example in train)
    per_question: dict[str, Counter[str]] = {}
    for example in train:
        per_question.setdefault(example.question, Counter())[example.answer] += 1
    return [
        per_question.get(example.question, overall).most_common(1)[0][0] for example in held_out
    ]


def answer_in_batches(
    loaded: LoadedModel,
    images: Sequence[Image.Image],
    examples: Sequence[Example],
    batch_size: int = 24,
) -> list[str]:
    """The model's answer to each example's question, about the image at the same place in `images`."""
    answers: list[str] = []
    for start in range(0, len(examples), batch_size):
        end = start + batch_size
        questions = [example.question for example in examples[start:end]]
        answers += loaded.answer(list(images[start:end]), questions, max_new_tokens=12)
    return answers


def _train(
    loaded: LoadedModel,
    examples: Sequence[Example],
    folder: Path,
    num_steps: int,
    seed: int,
    show_progress: bool,
) -> None:
    from transformers import Trainer, TrainingArguments

    arguments = TrainingArguments(
        output_dir=str(folder),
        max_steps=num_steps,
        per_device_train_batch_size=BATCH_SIZE,
        learning_rate=1e-3,
        warmup_steps=num_steps // 20,
        lr_scheduler_type="cosine",
        weight_decay=0.01,
        remove_unused_columns=False,
        save_strategy="no",
        logging_steps=max(num_steps // 10, 1),
        report_to="none",
        dataloader_pin_memory=torch.cuda.is_available(),
        disable_tqdm=not show_progress,
        seed=seed,
    )
    loaded.model.train()
    rows: Any = _as_rows(examples, seed)
    trainer = Trainer(
        loaded.model, arguments, train_dataset=rows, data_collator=ChatCollator(loaded.processor)
    )
    trainer.train()
    loaded.model.eval()


def _as_rows(examples: Sequence[Example], seed: int) -> list[dict[str, Any]]:
    """One conversation per image, its questions as turns in random order: more answers for one encoded image."""
    rng = random.Random(seed)
    rows = []
    for _, group in groupby(examples, key=lambda example: id(example.image)):
        turns = list(group)
        rng.shuffle(turns)
        messages: list[dict[str, Any]] = []
        for turn in turns:
            image = [{"type": "image", "image": turn.image}] if not messages else []
            messages += [
                {"role": "user", "content": [*image, {"type": "text", "text": turn.question}]},
                {"role": "assistant", "content": turn.answer},
            ]
        rows.append({"messages": messages})
    return rows
