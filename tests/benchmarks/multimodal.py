"""The joined model at its real size, as ratios to its own parts, to a rival, or to its own bytes.

    python -m tests.benchmarks.multimodal {build,answer,llava,prefill} [--batch 8] [--dtype float32]

BiomedCLIP's ViT-B/16 and a 22-layer TinyLlama with 11 layers of 4 experts; random weights,
bfloat16. `build` needs
12 GB of disk and 8 GB of memory, the others 5 GB (10 GB in float32) and no disk. Times are medians of rounds in which
the rivals take turns.
"""

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from PIL import Image
from torch import Tensor
from transformers import (
    CLIPVisionConfig,
    DynamicCache,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    PreTrainedConfig,
)

from moellava.encoders import BiomedClipImageProcessor, BiomedClipVisionConfig
from moellava.model import MoeLlavaConfig, MoeLlavaForConditionalGeneration, MoeLlavaProcessor
from moellava.model.builder_enhanced import LoadedModel, load_tokenizer
from moellava.model.chat_templates import multimodal_chat_template
from moellava.model.language_model import LlamaMoeConfig, LlamaMoeForCausalLM
from moellava.testing import write_biomedclip, write_tinyllama
from tests.benchmarks.encoders import alternate
from tests.benchmarks.language_model import TINYLLAMA

NEW_TOKENS = 32
QUESTION = "What modality is this? Answer the question."

# --- building, saving, reopening: each measurement in a process of its own, memory above the bare
# imports -----------

MEASURED = """
import json, resource, sys, time
import torch
from moellava.model.builder_enhanced import load_pretrained_model
import open_clip, timm
from PIL import Image
from safetensors import safe_open

def peak():
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) for line in status if line.startswith("VmHWM")) / 2**10

base, start = peak(), time.perf_counter()
{statement}
print(json.dumps({{"seconds": time.perf_counter() - start, "peak": peak() - base, **result}}))
"""

BUILD = """
loaded = load_pretrained_model({{"model_name_or_path": {language_model!r}, "mm_vision_tower": {tower!r}}})
bytes_ = sum(w.numel() * w.element_size() for w in loaded.model.parameters()) / 2**20
result = {{"bytes": bytes_, "parameters": loaded.model.num_parameters()}}
if {save!r}:
    loaded.model.save_pretrained({save!r}); loaded.processor.save_pretrained({save!r})
    result["answer"] = loaded.answer(Image.open({image!r}), "What is this?", max_new_tokens=8)
"""

# Every byte is read, not only mapped: a file that is mapped costs nothing until somebody looks.
READ_ALL = """
def read_all(weights):
    for weight in weights:
        weight.view(torch.int16).amax()
"""

REOPEN = (
    READ_ALL
    + """
loaded = load_pretrained_model({saved!r})
read_all(weight.detach() for weight in loaded.model.parameters())
result = {{"bytes": sum(w.numel() * w.element_size() for w in loaded.model.parameters()) / 2**20}}
"""
)

ANSWER = """
loaded = load_pretrained_model({saved!r})
result = {{"answer": loaded.answer(Image.open({image!r}), "What is this?", max_new_tokens=8)}}
"""

READ = (
    READ_ALL
    + """
from pathlib import Path
kept = []
for path in sorted(Path({saved!r}).glob("*.safetensors")):
    with safe_open(path, framework="pt") as file:
        kept += [file.get_tensor(key) for key in file.keys()]
read_all(kept)
result = {{}}
"""
)


def measure(statement: str, **names: object) -> dict[str, Any]:
    code = MEASURED.format(statement=statement.format(**names))
    output = subprocess.run(
        [sys.executable, "-c", code], check=True, capture_output=True, text=True
    ).stdout
    return json.loads(output.splitlines()[-1])


def bench_build(folder: Path) -> None:
    """Time, and peak memory against the model's own bytes."""
    tower, language_model, saved = (folder / name for name in ("biomedclip", "tinyllama", "saved"))
    write_biomedclip(tower, num_text_layers=1)
    write_tinyllama(
        language_model,
        hidden_size=2048,
        intermediate_size=5632,
        num_hidden_layers=22,
        num_attention_heads=32,
        num_key_value_heads=4,
    )
    parts = {"language_model": str(language_model), "tower": str(tower)}
    image = str(folder / "image.png")
    random_images(1)[0].save(image)
    first = measure(BUILD, **parts, save=str(saved), image=image)  # warms the disk cache as well
    assert measure(ANSWER, saved=str(saved), image=image)["answer"] == first["answer"]
    build = measure(BUILD, **parts, save="", image=image)
    statements = {"reopen": REOPEN, "read": READ}
    warm = {
        name: [measure(code, saved=str(saved)) for _ in range(5)]
        for name, code in statements.items()
    }
    cold: dict[str, list[dict[str, Any]]] = {name: [] for name in statements}
    for name, code in [*statements.items()] * 3:
        forget(saved)
        cold[name].append(measure(code, saved=str(saved)))
    reopen = warm["reopen"][0]
    print(f"parameters {build['parameters']:,}; the model's own bytes {build['bytes']:,.0f} MiB")
    print("| step | seconds | peak MiB | ratio | bound |")
    print("|---|---|---|---|---|")
    ratio = build["peak"] / build["bytes"]
    print(
        f"| build from parts | {build['seconds']:.1f} | {build['peak']:,.0f} | {ratio:.2f}x the model's bytes | 1.1x |"
    )
    ratio = reopen["peak"] / reopen["bytes"]
    print(f"| reopen, memory | | {reopen['peak']:,.0f} | {ratio:.2f}x the model's bytes | 1.05x |")
    for where, runs in (("disk", cold), ("the page cache", warm)):
        ours, bound = (
            statistics.median(run["seconds"] for run in runs[name]) for name in ("reopen", "read")
        )
        ratio = f"{ours / bound:.2f}x reading with safetensors ({bound:.2f})"
        print(f"| reopen from {where} | {ours:.2f} | | {ratio} | 1.5x |")


def forget(folder: Path) -> None:
    """Drop a folder's files from the page cache."""
    for path in folder.iterdir():
        with path.open("rb") as file:
            os.fsync(file.fileno())
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


# --- answering ------------------------------------------------------------------------------------
# ------------------


def random_model(
    vision: PreTrainedConfig,
    text: PreTrainedConfig,
    dtype: torch.dtype,
    projector: str = "mlp2x_gelu",
) -> MoeLlavaForConditionalGeneration:
    """A model whose weights are drawn in memory; it never ends an answer early."""
    config = MoeLlavaConfig(
        vision_config=vision,
        text_config=text,
        image_token_id=32000,
        projector_type=projector,
        dtype=dtype,
    )
    with torch.device("meta"):
        empty = MoeLlavaForConditionalGeneration(config).state_dict()
    state_dict = {}
    for name, weight in empty.items():
        is_scale = weight.dim() == 1 and name.endswith("weight")  # of a norm
        drawn = torch.empty(weight.shape, dtype=dtype)
        state_dict[name] = drawn.fill_(1.0) if is_scale else drawn.uniform_(-0.03, 0.03)
    model = MoeLlavaForConditionalGeneration.from_pretrained(
        None, config=config, state_dict=state_dict, dtype=dtype
    )
    model.generation_config.eos_token_id = None
    return model


def ready(model: MoeLlavaForConditionalGeneration) -> LoadedModel:
    """With TinyLlama's tokenizer, as far as a stand-in has it."""
    with tempfile.TemporaryDirectory() as name:
        tokenizer = load_tokenizer(write_tinyllama(Path(name)))
    processor = MoeLlavaProcessor(
        BiomedClipImageProcessor.from_open_clip({}, 224),
        tokenizer,
        num_image_tokens=model.config.num_image_tokens,
        chat_template=multimodal_chat_template(tokenizer),
    )
    return LoadedModel(model, processor)


def random_images(count: int) -> list[Image.Image]:
    random = np.random.default_rng(0)
    return [
        Image.fromarray(random.integers(0, 256, (512, 512, 3), dtype=np.uint8))
        for _ in range(count)
    ]


def prompt(loaded: LoadedModel, images: list[Image.Image]) -> dict[str, Tensor]:
    """What the model takes: the question about each image."""
    message = {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": QUESTION}]}
    text = loaded.processor.apply_chat_template(
        [[message]] * len(images), add_generation_prompt=True, tokenize=False
    )
    return dict(
        loaded.processor(
            images=images, text=text, padding=True, padding_side="left", return_tensors="pt"
        )
    )


@torch.inference_mode()
def bench_answer(batch: int, dtype: torch.dtype, rounds: int) -> None:
    """`answer`, from the picture to the text, against encoder and language model run one after the
    other by hand.
    """
    model = random_model(
        BiomedClipVisionConfig(), LlamaMoeConfig(**{**TINYLLAMA, "vocab_size": 32001}), dtype
    )
    loaded, images = ready(model), random_images(batch)
    inputs = prompt(loaded, images)
    with torch.device("meta"):
        language_model = LlamaMoeForCausalLM(model.config.text_config)
    language_model.model, language_model.lm_head = model.model.language_model, model.lm_head
    image_embeds = torch.cat(
        model.get_image_features(inputs["pixel_values"], return_dict=True).pooler_output
    )
    is_image = (inputs["input_ids"] == model.config.image_token_id).unsqueeze(-1)
    inputs_embeds = model.get_input_embeddings()(inputs["input_ids"]).masked_scatter(
        is_image, image_embeds
    )
    state: dict[str, Any] = {}

    def encoder() -> None:
        model.get_image_features(inputs["pixel_values"], return_dict=True)

    def prefill() -> None:
        state["cache"] = DynamicCache(config=language_model.config)
        output = language_model(inputs_embeds=inputs_embeds, cache=state["cache"], logits_to_keep=1)
        state["ids"] = output.logits[:, -1].argmax(-1, keepdim=True)

    def decode() -> None:
        ids = state["ids"]
        for _ in range(NEW_TOKENS - 1):
            ids = language_model(ids, cache=state["cache"]).logits[:, -1].argmax(-1, keepdim=True)

    runs: dict[str, Callable[[], object]] = {
        "encoder": encoder,
        "prefill": prefill,
        "decode": decode,
        "answer": lambda: loaded.answer(images, [QUESTION] * batch, max_new_tokens=NEW_TOKENS),
    }
    seconds = alternate(runs, rounds)
    parts = [
        sum(turn)
        for turn in zip(seconds["encoder"], seconds["prefill"], seconds["decode"], strict=True)
    ]
    label = f"answer, {name_of(dtype)}, batch {batch}, {inputs['input_ids'].shape[1]} + {NEW_TOKENS} tokens"
    print_ratio(label, seconds["answer"], parts, "1.05")
    print(
        "| of these | s | |",
        *(f"{name} {statistics.median(seconds[name]):.3g}" for name in list(runs)[:3]),
        "| | |",
    )


@torch.inference_mode()
def bench_llava(batch: int, dtype: torch.dtype, rounds: int) -> None:
    """`generate` against that of transformers' LLaVA, the very same weights: CLIP ViT-B/16, a dense
    TinyLlama.
    """
    vision = CLIPVisionConfig(
        hidden_size=768,
        intermediate_size=3072,
        num_hidden_layers=12,
        num_attention_heads=12,
        patch_size=16,
    )
    text = LlamaConfig(**{**TINYLLAMA, "vocab_size": 32001})
    ours = random_model(vision, text, dtype)
    with torch.device("meta"):
        theirs: Any = LlavaForConditionalGeneration(
            LlavaConfig(
                vision_config=vision, text_config=text, image_token_index=32000, dtype=dtype
            )
        ).eval()
    theirs.model.vision_tower = ours.model.vision_tower.tower
    theirs.model.language_model, theirs.lm_head = ours.model.language_model, ours.lm_head
    projector = ours.model.multi_modal_projector
    theirs.model.multi_modal_projector.linear_1 = projector[0]
    theirs.model.multi_modal_projector.linear_2 = projector[2]
    inputs = prompt(ready(ours), random_images(batch))
    inputs["pixel_values"] = inputs["pixel_values"].to(dtype)
    options = {
        "max_new_tokens": NEW_TOKENS,
        "do_sample": False,
        "pad_token_id": 2,
        "eos_token_id": None,
    }
    answers: dict[str, Tensor] = {}

    def generate(name: str, model: Any) -> Callable[[], None]:
        def run() -> None:
            answers[name] = model.generate(**inputs, **options)

        return run

    seconds = alternate(
        {name: generate(name, model) for name, model in (("ours", ours), ("theirs", theirs))},
        rounds,
    )
    assert torch.equal(answers["ours"], answers["theirs"])
    label = f"generate, dense, {name_of(dtype)}, batch {batch}, {inputs['input_ids'].shape[1]} + {NEW_TOKENS} tokens"
    print_ratio(label, seconds["ours"], seconds["theirs"], "1.03")


@torch.inference_mode()
def bench_prefill(batch: int, dtype: torch.dtype, rounds: int) -> None:
    """From the pixels to the first token: 49 image tokens by `pixel_shuffle` against the 196 of
    `mlp2x_gelu`.
    """
    text = LlamaMoeConfig(**{**TINYLLAMA, "vocab_size": 32001})
    full = random_model(BiomedClipVisionConfig(), text, dtype)
    with torch.device("meta"):
        config = MoeLlavaConfig(**{**full.config.to_dict(), "projector_type": "pixel_shuffle"})
        small = MoeLlavaForConditionalGeneration(config).eval()
    small.model.vision_tower, small.model.language_model = (
        full.model.vision_tower,
        full.model.language_model,
    )
    small.lm_head = full.lm_head
    projector = small.model.multi_modal_projector.to_empty(device="cpu").to(dtype)
    for weight in projector.parameters():
        weight.uniform_(-0.03, 0.03)
    inputs = {model: prompt(ready(model), random_images(batch)) for model in (small, full)}
    calls = {
        name: lambda model=model: model(**inputs[model], logits_to_keep=1)
        for name, model in (("small", small), ("full", full))
    }
    calls["encoder"] = lambda: full.get_image_features(
        inputs[full]["pixel_values"], return_dict=True
    )
    seconds = alternate(calls, rounds)
    lengths = "against".join(f" {inputs[model]['input_ids'].shape[1]} " for model in (small, full))
    print_ratio(
        f"first token, {name_of(dtype)}, batch {batch},{lengths}tokens",
        seconds["small"],
        seconds["full"],
        "0.5",
    )
    without = {
        name: [whole - part for whole, part in zip(seconds[name], seconds["encoder"], strict=True)]
        for name in ("small", "full")
    }
    print_ratio("the same without the encoder", without["small"], without["full"], "0.5")


def name_of(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def print_ratio(what: str, ours: list[float], theirs: list[float], bound: str) -> None:
    """Medians with their range, and the ratio of the medians."""

    def spread(values: list[float]) -> str:
        return f"{statistics.median(values):.3g} ({min(values):.3g}-{max(values):.3g})"

    ratio = statistics.median(ours) / statistics.median(theirs)
    print(
        f"| {what} | s | {spread(ours)} | {spread(theirs)} | **{ratio:.3f}** | <= {bound} |",
        flush=True,
    )


GENERATION = {"answer": bench_answer, "llava": bench_llava, "prefill": bench_prefill}


def main() -> None:
    """Print the table of one benchmark."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("section", choices=("build", *GENERATION))
    parser.add_argument(
        "folder", nargs="?", type=Path, help="for the files of `build`; default: a temporary one"
    )
    parser.add_argument("--batch", type=int, default=1, help="images, one question each")
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), default="bfloat16")
    parser.add_argument("--rounds", type=int, help="default: 5, and 1 for more than one image")
    arguments = parser.parse_args()
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    torch.manual_seed(0)
    print(
        f"{arguments.section}: torch {torch.__version__}, transformers {transformers.__version__}, "
        f"{torch.get_num_threads()} threads, {platform.machine()}"
    )
    if arguments.section == "build":
        with tempfile.TemporaryDirectory() as name:
            bench_build(arguments.folder or Path(name))
        return
    print("| what | unit | moellava | rival | ratio | asked |\n|---|---|---|---|---|---|")
    rounds = arguments.rounds or (5 if arguments.batch == 1 else 1)
    GENERATION[arguments.section](arguments.batch, getattr(torch, arguments.dtype), rounds)


if __name__ == "__main__":
    main()
