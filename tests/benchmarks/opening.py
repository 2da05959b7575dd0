"""What the check for NaN and infinity costs when a saved model is opened.

python -m tests.benchmarks.opening

Opening with the check, without it, and with `torch.isfinite` in its place take turns, in one
process; then the same up to the first token of an answer, which reads the weights anyway.
"""

import statistics
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from unittest import mock

import torch
from PIL import Image
from torch import Tensor

from moellava.model.builder_enhanced import load_pretrained_model
from moellava.storage.weights import nonfinite_names
from moellava.testing import write_biomedclip, write_tinyllama

NUM_ROUNDS = 7
CHECKED = "moellava.model.checkpoint.strict.nonfinite_names"


def by_isfinite(weights: Mapping[str, Tensor]) -> list[str]:
    """The plain way."""
    return [
        name
        for name, weight in weights.items()
        if weight.is_floating_point() and not bool(torch.isfinite(weight).all())
    ]


CHECKS: dict[str, Callable[[Mapping[str, Tensor]], list[str]]] = {
    "no check": lambda weights: [],
    "moellava": nonfinite_names,
    "torch.isfinite": by_isfinite,
}


def main() -> None:
    """Print a table; the first round warms the disk's cache and is left out."""
    with tempfile.TemporaryDirectory() as home:
        folder = Path(home)
        size = {"hidden_size": 2048, "intermediate_size": 5632, "num_attention_heads": 32}
        parts = {
            "mm_vision_tower": str(write_biomedclip(folder / "tower")),
            "model_name_or_path": str(
                write_tinyllama(folder / "llama", num_hidden_layers=4, **size)
            ),
        }
        loaded = load_pretrained_model(parts, moe_config=False, dtype="bfloat16")
        loaded.model.save_pretrained(folder / "saved")
        loaded.processor.save_pretrained(folder / "saved")
        print(f"{(folder / 'saved' / 'model.safetensors').stat().st_size / 1e9:.2f} GB, bfloat16")
        del loaded
        opened = {name: [] for name in CHECKS}
        answered = {name: [] for name in CHECKS}
        for _ in range(NUM_ROUNDS + 1):
            for name, check in CHECKS.items():
                with mock.patch(CHECKED, check):
                    first, second = times_of(folder / "saved")
                opened[name].append(first)
                answered[name].append(second)
    print("| check | opening, s, median (range) | ratio | opening and one token | ratio |")
    print("|---|---|---|---|---|")
    for name in CHECKS:
        cells = [
            cell
            for found in (opened, answered)
            for cell in (_spread(found[name]), f"{_ratio(found[name], found['no check']):.2f}")
        ]
        print(f"| {name} | {' | '.join(cells)} |")


def times_of(folder: Path) -> tuple[float, float]:
    """Seconds until the model is open, and until it has answered with one token."""
    start = time.perf_counter()
    loaded = load_pretrained_model(folder)
    middle = time.perf_counter()
    loaded.answer(Image.new("RGB", (224, 224)), "What?", max_new_tokens=1)
    return middle - start, time.perf_counter() - start


def _ratio(seconds: list[float], base: list[float]) -> float:
    return statistics.median(seconds[1:]) / statistics.median(base[1:])


def _spread(seconds: list[float]) -> str:
    seconds = seconds[1:]
    return f"{statistics.median(seconds):.2f} ({min(seconds):.2f}-{max(seconds):.2f})"


if __name__ == "__main__":
    main()
