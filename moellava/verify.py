"""Is everything here that a model needs? `verify` looks step by step.

Versions, files, the encoder alone, then the whole model on one image.
"""

import platform
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch
from PIL import Image

from moellava.encoders import DEFAULT_BIOMEDCLIP, create_encoder, parse_source
from moellava.encoders.factory import kind_of
from moellava.memory import peak_memory_mib
from moellava.model.builder_enhanced import LoadedModel, describe, load_pretrained_model
from moellava.model.language_model.checkpoint import WEIGHT_FILES
from moellava.storage.sources import Source, commit_of, find_file

DEFAULT_TOWER = DEFAULT_BIOMEDCLIP
DEFAULT_LANGUAGE_MODEL = "TinyLlama/TinyLlama-1.1B-Chat-v1.0"
PACKAGES = ("torch", "torchvision", "transformers", "open_clip_torch", "timm", "huggingface_hub")


@dataclass(frozen=True)
class Check:
    """One step: whether it passed, what was seen (or what to do), and what it took."""

    name: str
    passed: bool
    detail: str
    seconds: float
    peak_mebibytes: float  # highest resident memory of the process so far


def verify(
    tower: str = DEFAULT_TOWER, language_model: str = DEFAULT_LANGUAGE_MODEL
) -> Iterator[Check]:
    """Check step by step, yielding each result as it comes; a failed step ends what depends on it.

    Args:
        tower: id or folder of the image encoder.
        language_model: id or folder of the language model.
    """
    loaded: list[LoadedModel] = []
    steps: list[tuple[str, Callable[[], str]]] = [
        ("versions", _versions),
        ("tower files", lambda: _tower_files(tower)),
        ("language model files", lambda: _language_model_files(language_model)),
        ("encoder alone", lambda: _encoder_alone(tower)),
        ("model built", lambda: _build_model(tower, language_model, loaded)),
        ("model answers", lambda: _answer(loaded[0])),
    ]
    for name, step in steps:
        start = time.perf_counter()
        try:
            passed, detail = True, step()
        except (OSError, ValueError, ImportError, RuntimeError) as error:
            passed, detail = False, str(error)
        yield Check(name, passed, detail, time.perf_counter() - start, peak_memory_mib())
        if not passed:
            return


def sample_image() -> Image.Image:
    """A picture with content in each patch: two gradients and a grid, 320 x 240."""
    across = Image.linear_gradient("L").rotate(90).resize((320, 240))
    down = Image.linear_gradient("L").resize((320, 240))
    grid = Image.new("L", (320, 240))
    grid.putdata([255 * (x // 8 % 2 ^ y // 8 % 2) for y in range(240) for x in range(320)])
    return Image.merge("RGB", (across, down, grid))


def _versions() -> str:
    def installed(name: str) -> str:
        try:
            return version(name)
        except PackageNotFoundError:
            return "not installed"

    found = {name: installed(name) for name in PACKAGES}
    missing = [name for name, text in found.items() if text == "not installed"]
    if missing:
        raise ImportError(
            f"{', '.join(missing)} not installed. Type: pip install {' '.join(missing)}"
        )
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "no CUDA device"
    packages = ", ".join(f"{name} {text}" for name, text in found.items())
    return f"Python {platform.python_version()}, {packages}; {device}"


def _tower_files(tower: str) -> str:
    source = parse_source(tower)
    files = kind_of(None, tower).files(source, download=True)
    return "; ".join(_place(path or find_file(source, name, download=True)) for name, path in files)


def _language_model_files(language_model: str) -> str:
    source = parse_source(language_model)
    kinds = (("config.json",), ("tokenizer.json", "tokenizer.model"), WEIGHT_FILES)
    return "; ".join(_place(_first_file(source, names)) for names in kinds)


def _first_file(source: Source, names: Sequence[str]) -> Path | None:
    found = (find_file(source, name, download=True, required=False) for name in names)
    return next((path for path in found if path), None) or find_file(
        source, names[0], download=True
    )


def _place(path: Path | None) -> str:
    assert path is not None  # download=True finds it or raises
    commit = commit_of(path)
    return f"{path} ({'cache of the hub, ' + commit[:7] if commit else 'folder'})"


def _encoder_alone(tower: str) -> str:
    encoder = create_encoder(None, tower)
    tokens = encoder.encode(sample_image())  # (1, N, D)
    kind = "synthesized from the pooled vector" if encoder.synthesized else "real"
    if not encoder.synthesized and float(tokens.std(dim=1).max()) == 0:
        raise ValueError(
            "All patch tokens of an image are equal: the weights are damaged. Fetch them again."
        )
    height, width = encoder.grid
    return (
        f"{tokens.shape[1]} patch tokens of width {tokens.shape[2]}, {kind}, {height}x{width} grid"
    )


def _build_model(tower: str, language_model: str, loaded: list[LoadedModel]) -> str:
    loaded.append(
        load_pretrained_model({"model_name_or_path": language_model, "mm_vision_tower": tower})
    )
    return "\n" + describe(loaded[0].model)


def _answer(loaded: LoadedModel) -> str:
    image, question = sample_image(), "What is shown?"
    inputs = loaded.processor(text=f"<image>\n{question}", images=image, return_tensors="pt")
    with torch.inference_mode():
        logits = loaded.model(**inputs).logits
    if not bool(torch.isfinite(logits).all()):
        raise ValueError("The logits hold NaN or infinity.")
    (answer,) = loaded.answer(image, question, max_new_tokens=8)
    return (
        f"{tuple(logits.shape)} logits, all finite; 8 tokens of an untrained projector: {answer!r}"
    )
