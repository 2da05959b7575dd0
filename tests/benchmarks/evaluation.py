"""Evaluation at real tower size and with a small language model, against plainer ways in one run.

    python -m tests.benchmarks.evaluation [answers score]

Weights are random, so that every answer has its full length. `--images` and `--rows` make it
smaller.
"""

import argparse
import json
import os
import platform
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"

import numpy as np
import torch
from PIL import Image

from moellava import load_pretrained_model
from moellava.data import Turn
from moellava.eval import asking
from moellava.eval.answer_file import AnswerFile
from moellava.eval.asking import Answered, Asked, Asker
from moellava.eval.predictions import Prediction
from moellava.testing import write_biomedclip, write_tinyllama

QUESTIONS_PER_IMAGE = 7  # VQA-RAD has 3,515 questions about 315 images, its test set 451 about 203
MAX_NEW_TOKENS = 4
BATCH_SIZE = 8
ROUNDS = 3

# The command as typed; the last line has the peak of its memory in kB. VmHWM, since ru_maxrss begins
# with what the process had that started it.
SCORE = """
import sys
from moellava.cli import app
try:
    app(["eval", "score", *sys.argv[1:]])
finally:
    status = open("/proc/self/status").read()
    print(status.split("VmHWM:")[1].split()[0])
"""


def answers(num_images: int) -> None:
    """Questions a second: ours, `answer` for each, and batches in the order of the file."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_biomedclip(folder / "biomedclip")
        write_tinyllama(folder / "tinyllama", hidden_size=256, intermediate_size=704)
        loaded = load_pretrained_model(
            {
                "model_name_or_path": str(folder / "tinyllama"),
                "mm_vision_tower": str(folder / "biomedclip"),
            },
            dtype="float32",
        )
    rng = np.random.default_rng(0)
    pictures = {
        f"{number}": Image.fromarray(rng.integers(0, 256, (224, 224, 3), dtype=np.uint8))
        for number in range(num_images)
    }
    asked = _questions(list(pictures))
    asker = Asker(
        loaded, pictures.__getitem__, max_new_tokens=MAX_NEW_TOKENS, batch_size=BATCH_SIZE
    )

    def ours() -> None:
        """With the checks of lengths and the growing file, as `evaluate` does it."""
        with tempfile.TemporaryDirectory() as folder:
            file = AnswerFile(Path(folder) / "predictions.jsonl", {})
            asker.check(asked)
            for batch in asker.ask(asked):
                file.append(map(_prediction, batch))
            file.finish([question.id for question in asked])

    def one_by_one() -> None:
        for question in asked:
            loaded.answer(
                pictures[question.images[0]], _text(question), max_new_tokens=MAX_NEW_TOKENS
            )

    def in_file_order() -> None:
        for start in range(0, len(asked), BATCH_SIZE):
            batch = asked[start : start + BATCH_SIZE]
            loaded.answer(
                [pictures[question.images[0]] for question in batch],
                [_text(question) for question in batch],
                max_new_tokens=MAX_NEW_TOKENS,
            )

    found = _seconds({"ours": ours, "answer": one_by_one, "file order": in_file_order})
    for way, seconds in found.items():
        middle = statistics.median(seconds)
        ratio = middle / statistics.median(found["ours"])
        spread = f"{min(seconds):.2f} to {max(seconds):.2f} s"
        print(f"{way:<12} {len(asked) / middle:7.1f} questions/s ({spread}), {ratio:.2f}x ours")
    shares = [_shares_of_time(ours, asker) for _ in range(ROUNDS)]
    for name in shares[0]:
        found_here = [100 * share[name] for share in shares]
        spread = f"{min(found_here):.1f} to {max(found_here):.1f}"
        print(f"{name}: {statistics.median(found_here):.1f} % of the time ({spread})")


def score(num_rows: int) -> None:
    """Seconds and memory of `moellava eval score` with every rule, intervals and imports included."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for num_images in (0, 1, 3):
            path = folder / f"{num_images}.jsonl"
            _write_predictions(path, num_rows, num_images)
            done = [_score(str(path)) for _ in range(ROUNDS if num_images == 1 else 1)]
            _say(f"score {num_rows:,} rows of {num_images} images", done)
        files = [_score(str(folder / "1.jsonl"), "--out", str(folder / "out"))]
        _say("the same with predictions.jsonl, scores.json and report.html", files)


def _score(*arguments: str) -> tuple[float, float]:
    """Seconds of one core that the process took, and its peak of memory in MiB."""
    began = _seconds_of_children()
    done = subprocess.run(
        [sys.executable, "-c", SCORE, *arguments], check=True, capture_output=True, text=True
    )
    return _seconds_of_children() - began, int(done.stdout.split()[-1]) / 1024


def _seconds_of_children() -> float:
    times = os.times()
    return times.children_user + times.children_system


def _say(what: str, done: list[tuple[float, float]]) -> None:
    seconds, memory = zip(*done, strict=True)
    spread = f"{min(seconds):.1f} to {max(seconds):.1f} s"
    print(f"{what}: {statistics.median(seconds):.1f} s ({spread}), {max(memory):.0f} MiB")


def _prediction(answered: Answered) -> Prediction:
    return Prediction(
        id=answered.id,
        answer=answered.text,
        truth="yes",
        answer_type="closed",
        answer_type_from="data",
        num_tokens=answered.num_tokens,
        seconds=answered.seconds,
    )


def _questions(names: list[str]) -> list[Asked]:
    """Several of different lengths about each image, in mixed order, as published files have them."""
    rng = random.Random(0)
    asked = [
        Asked(
            id=f"{name}-{number}",
            turns=(Turn("user", "<image>\nIs there a finding?" + " Why?" * rng.randint(0, 40)),),
            images=(name,),
        )
        for name in names
        for number in range(QUESTIONS_PER_IMAGE)
    ]
    rng.shuffle(asked)
    return asked


def _text(question: Asked) -> str:
    return question.turns[0].text.removeprefix("<image>\n")


def _seconds(ways: dict[str, Callable[[], None]]) -> dict[str, list[float]]:
    """Each way once to warm up, then in turns."""
    found: dict[str, list[float]] = {way: [] for way in ways}
    for number in range(ROUNDS + 1):
        for way, call in ways.items():
            began = time.perf_counter()
            call()
            if number:
                found[way].append(time.perf_counter() - began)
    return found


def _shares_of_time(ours: Callable[[], None], asker: Asker) -> dict[str, float]:
    """What of a run is in the model (tower and `generate`), in its image processor, and beside."""
    inside = {"model": 0.0, "image processor": 0.0}

    def timed(name, call):
        def wrapped(*args, **options):
            began = time.perf_counter()
            result = call(*args, **options)
            inside[name] += time.perf_counter() - began
            return result

        return wrapped

    model, generate = asker.loaded.model, asking.generate_texts
    processor = asker.loaded.processor
    image_processor = processor.image_processor
    asking.generate_texts = timed("model", generate)
    model.get_image_features = timed("model", model.get_image_features)
    processor.image_processor = timed("image processor", image_processor)
    try:
        began = time.perf_counter()
        ours()
        whole = time.perf_counter() - began
    finally:
        asking.generate_texts = generate
        del model.get_image_features
        processor.image_processor = image_processor
    shares = {name: seconds / whole for name, seconds in inside.items()}
    return {**shares, "beside both": 1 - sum(shares.values())}


def _write_predictions(path: Path, num_rows: int, num_images: int) -> None:
    rng = random.Random(0)
    words = [
        "left",
        "right",
        "upper",
        "lower",
        "lung",
        "lobe",
        "heart",
        "liver",
        "kidney",
        "mass",
        "nodule",
        "opacity",
        "effusion",
        "normal",
        "enlarged",
        "the",
        "in",
        "of",
        "a",
        "shows",
        "small",
        "large",
        "with",
        "and",
        "chest",
        "ct",
        "mri",
        "x-ray",
    ]
    with path.open("w") as file:
        for number in range(num_rows):
            options: tuple[str, ...] = ()
            answer_type = rng.choices(["closed", "open", "choice"], [5, 4, 1])[0]
            if answer_type == "closed":
                truth = rng.choice(["yes", "no"])
                answer = rng.choice(["Yes", "No", f"No, there is no {rng.choice(words)}"])
            elif answer_type == "open":
                truth = " ".join(rng.sample(words, rng.choice([1, 1, 2, 3])))
                answer = " ".join(rng.sample(words, rng.choice([1, 2, 3, 6])))
            else:
                options = tuple(rng.sample(words, 4))
                truth, answer = rng.choice(options), rng.choice(["A", "B", f"C. {options[2]}"])
            line = Prediction(
                id=str(number),
                images=tuple(
                    f"images/case-{number // QUESTIONS_PER_IMAGE}/view-{view}.png"
                    for view in range(num_images)
                ),
                question="What is shown in this image?",
                answer=answer,
                truth=truth,
                answer_type=answer_type,
                answer_type_from="data",
                options=options,
                groups={"modality": rng.choice(["CT", "MR", "X-ray"])},
            )
            file.write(f"{line.as_line()}\n")


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("parts", nargs="*", default=["answers", "score"])
    parser.add_argument("--images", type=int, default=10)
    parser.add_argument("--rows", type=int, default=100_000)
    arguments = parser.parse_args()
    facts = {"torch": torch.__version__, "threads": torch.get_num_threads()}
    print(platform.processor() or platform.machine(), json.dumps(facts))
    if "answers" in arguments.parts:
        answers(arguments.images)
    if "score" in arguments.parts:
        score(arguments.rows)


if __name__ == "__main__":
    main()
