"""Encoders at BiomedCLIP's real dimensions, each number a ratio to a rival measured in the same
run.

    python -m tests.benchmarks.encoders [load tokens precision preprocess folder]

Weights are random (a stand-in in the layout of the 784 MB pickle, its text tower BERT-base).
"""

import argparse
import json
import os
import platform
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

from moellava.encoders import BiomedClipEncoder
from moellava.encoders.feature_file import encode_files
from moellava.encoders.precision import choose_precision, in_precision
from moellava.testing import write_biomedclip

# Run in a fresh process: the seconds, or the peak resident megabytes, that loading costs above the
# imports. One at a
# time, because the thread that watches the memory takes its share of two cores.
LOAD = """
import sys, threading, time
import open_clip, timm, torch, transformers
from moellava.encoders import BiomedClipEncoder

def resident():
    for line in open("/proc/self/status"):
        if line.startswith("VmRSS:"):
            return int(line.split()[1]) / 1024

def seconds(call):
    start = time.perf_counter()
    kept = call()
    return time.perf_counter() - start

def megabytes(call):
    before, peak, done = resident(), 0, threading.Event()
    def watch():
        nonlocal peak
        while not done.is_set():
            peak = max(peak, resident())
            time.sleep(0.001)
    thread = threading.Thread(target=watch)
    thread.start()
    kept = call()
    done.set()
    thread.join()
    return peak - before

def ours():
    encoder = BiomedClipEncoder.from_pretrained(sys.argv[1])
    if sys.argv[2] == "ours, every weight read":
        sum(float(p.sum()) for p in encoder.parameters())
    return encoder

def theirs():
    return open_clip.create_model_from_pretrained("local-dir:" + sys.argv[1])

measure = {"s": seconds, "MB": megabytes}[sys.argv[3]]
print(measure(theirs if sys.argv[2] == "open_clip" else ours))
"""


def write_repo(folder: Path) -> Path:
    """BiomedCLIP's files at real size: ViT-B/16 and BERT-base, with their published keys."""
    from transformers import BertConfig, BertModel

    write_biomedclip(folder)
    file = folder / "open_clip_pytorch_model.bin"
    state = torch.load(file, weights_only=True)
    bert = BertModel(BertConfig(), add_pooling_layer=False)
    state = {key: value for key, value in state.items() if not key.startswith("text.transformer")}
    state |= {f"text.transformer.{key}": value for key, value in bert.state_dict().items()}
    state["text.transformer.embeddings.position_ids"] = torch.arange(512).unsqueeze(0)
    state["text.proj.0.weight"], state["text.proj.2.weight"] = (
        torch.randn(640, 768),
        torch.randn(512, 640),
    )
    torch.save(state, file)
    # open_clip asks for the text model's config by name; a folder spares it the hub
    # (open_clip#772).
    BertConfig().save_pretrained(folder / "bert")
    config = json.loads((folder / "open_clip_config.json").read_text())
    config["model_cfg"]["text_cfg"]["hf_model_name"] = str(folder / "bert")
    (folder / "open_clip_config.json").write_text(json.dumps(config))
    return folder


def random_images(count: int, seed: int = 0) -> list[Image.Image]:
    """Grey and colour images of mixed sizes, 300 to 1200 pixels a side, as scans and photographs
    have.
    """
    random = np.random.default_rng(seed)
    images = []
    for i in range(count):
        width, height = random.integers(300, 1200, 2)
        shape = (height, width) if i % 2 else (height, width, 3)
        images.append(Image.fromarray(random.integers(0, 256, shape, dtype=np.uint8)))
    return images


def alternate(calls: dict[str, Callable[[], object]], rounds: int) -> dict[str, list[float]]:
    """Seconds of each call, the rivals taking turns, after one unmeasured turn."""
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for turn in range(rounds + 1):
        for name, call in calls.items():
            start = time.perf_counter()
            call()
            if turn:
                seconds[name].append(time.perf_counter() - start)
    return seconds


def row(
    what: str, unit: str, ours: list[float], theirs: list[float], ratio: float, bound: str
) -> None:
    def spread(values: list[float]) -> str:
        return f"{statistics.median(values):.3g} ({min(values):.3g}-{max(values):.3g})"

    print(f"| {what} | {unit} | {spread(ours)} | {spread(theirs)} | **{ratio:.2f}** | {bound} |")


def load(repo: Path) -> None:
    """Time and peak memory of loading the tower, each in fresh processes."""
    names = ("ours", "ours, every weight read", "open_clip")
    for unit, bound in (("s", "<= 0.1"), ("MB", "<= 0.3")):
        results: dict[str, list[float]] = {name: [] for name in names}
        for turn in range(4):
            for name in names:
                words = [sys.executable, "-c", LOAD, str(repo), name, unit]
                done = subprocess.run(words, capture_output=True, text=True, check=True)
                if turn:  # the first turn fills the disk cache
                    results[name].append(float(done.stdout.splitlines()[-1]))
        theirs = results["open_clip"]
        for name in names[:2]:
            ratio = statistics.median(results[name]) / statistics.median(theirs)
            row(f"load tower ({name})", unit, results[name], theirs, ratio, bound)


def tokens(repo: Path) -> None:
    """Patch tokens of 16 images against open_clip's encode_image."""
    import open_clip

    encoder = BiomedClipEncoder.from_pretrained(repo)
    model, _ = open_clip.create_model_from_pretrained(f"local-dir:{repo}")
    model.eval()
    pixels = torch.randn(16, 3, 224, 224)
    with torch.inference_mode():
        calls = {"ours": lambda: encoder(pixels), "theirs": lambda: model.encode_image(pixels)}
        seconds = alternate(calls, rounds=7)
    ours, theirs = ([16 / s for s in seconds[name]] for name in ("ours", "theirs"))
    ratio = statistics.median(ours) / statistics.median(theirs)
    row("patch tokens, batch of 16", "images/s", ours, theirs, ratio, ">= 1.05")


def precision(repo: Path) -> None:
    """Patch tokens in bfloat16 against open_clip's own encode_image, with the cosine to float32."""
    import open_clip

    encoder = BiomedClipEncoder.from_pretrained(repo)
    half = in_precision(encoder, "bfloat16")
    model, _ = open_clip.create_model_from_pretrained(f"local-dir:{repo}")
    model.eval()
    pixels = torch.randn(16, 3, 224, 224)
    narrow = pixels.bfloat16()
    with torch.inference_mode():
        calls = {"ours": lambda: half(narrow), "theirs": lambda: model.encode_image(pixels)}
        seconds = alternate(calls, rounds=7)
        exact, found = encoder(pixels).patch_tokens, half(narrow).patch_tokens.float()
    ours, theirs = ([16 / s for s in seconds[name]] for name in ("ours", "theirs"))
    ratio = statistics.median(ours) / statistics.median(theirs)
    row("patch tokens in bfloat16, batch of 16", "images/s", ours, theirs, ratio, ">= 2.5")
    cosine = torch.nn.functional.cosine_similarity(found, exact, dim=-1)
    print(f"\nauto: {choose_precision('auto', encoder.device)}")
    print(f"cosine to float32: mean {cosine.mean():.5f}, least {cosine.min():.5f}")


def preprocess(repo: Path) -> None:
    """64 mixed images against open_clip's transform, with equal results."""
    from open_clip.transform import PreprocessCfg, image_transform_v2

    from moellava.encoders import BiomedClipImageProcessor

    images = random_images(64)
    transform = image_transform_v2(PreprocessCfg(), is_train=False)
    processor = BiomedClipImageProcessor.from_open_clip({}, 224)

    def ours() -> torch.Tensor:
        return processor(images, return_tensors="pt")["pixel_values"]

    def theirs() -> torch.Tensor:
        return torch.stack([transform(image) for image in images])

    assert torch.equal(ours(), theirs())
    seconds = alternate({"ours": ours, "theirs": theirs}, rounds=7)
    fast, slow = ([64 / s for s in seconds[name]] for name in ("ours", "theirs"))
    ratio = statistics.median(fast) / statistics.median(slow)
    row("preprocess 64 mixed images", "images/s", fast, slow, ratio, ">= 1.5")


def folder(repo: Path) -> None:
    """`moellava encode` of 200 files against the model alone on ready pixels."""
    encoder = BiomedClipEncoder.from_pretrained(repo)
    pixels = torch.randn(16, 3, 224, 224)
    with tempfile.TemporaryDirectory() as name:
        paths = [Path(name) / f"{i:03}.jpg" for i in range(200)]
        for path, image in zip(paths, random_images(200), strict=True):
            image.save(path)
        names = [path.name for path in paths]
        ours, theirs = [], []
        for turn in range(3):
            start = time.perf_counter()
            with torch.inference_mode():
                for first in range(0, 200, 16):
                    encoder(pixels[: 200 - first])
            theirs.append(200 / (time.perf_counter() - start))
            start = time.perf_counter()
            encode_files(encoder, paths, names, Path(name) / f"{turn}.safetensors")
            ours.append(200 / (time.perf_counter() - start))
    ratio = statistics.median(ours) / statistics.median(theirs)
    row("encode a folder of 200 JPEGs", "images/s", ours, theirs, ratio, ">= 0.9")


BENCHMARKS = {
    "load": load,
    "tokens": tokens,
    "precision": precision,
    "preprocess": preprocess,
    "folder": folder,
}


def main() -> None:
    """Print a table of the benchmarks asked for, all of them by default."""
    parser = argparse.ArgumentParser()
    parser.add_argument("which", nargs="*", default=list(BENCHMARKS), help=", ".join(BENCHMARKS))
    which = parser.parse_args().which
    if unknown := sorted(set(which) - set(BENCHMARKS)):
        parser.error(f"unknown {', '.join(unknown)}; known: {', '.join(BENCHMARKS)}")
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads, {platform.machine()}")
    print("\n| what | unit | moellava | rival | ratio | asked |\n|---|---|---|---|---|---|")
    with tempfile.TemporaryDirectory() as name:
        repo = write_repo(Path(name) / "biomedclip")
        for benchmark in which:
            BENCHMARKS[benchmark](repo)


if __name__ == "__main__":
    main()
