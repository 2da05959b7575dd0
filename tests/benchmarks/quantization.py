"""Weights of 8 and 4 bits against bfloat16, measured in the same run.

    python -m tests.benchmarks.quantization products
    python -m tests.benchmarks.quantization model [LAYERS]      TinyLlama's widths; 22 by default
    python -m tests.benchmarks.quantization quality FOLDER      a dense Llama with its tokenizer

`products` says up to how many tokens torch's packed product is faster than unpacking first. `model`
needs 5 GB of memory and of disk. `quality` is in float32 and upcycles the Llama first.
"""

import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from subprocess import run as run_process
from threading import Thread

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import AutoTokenizer
from transformers.initialization import no_init_weights

from moellava.model.language_model import LlamaMoeConfig, LlamaMoeForCausalLM, upcycle
from moellava.model.quantization import MoellavaQuantizationConfig, weight_bytes
from moellava.model.quantization import weight as weight_module
from moellava.model.quantization.rounding import Scheme
from moellava.model.quantization.weight import QuantizedWeight
from tests.benchmarks.language_model import medians

TINYLLAMA = {
    "hidden_size": 2048, "intermediate_size": 5632, "num_attention_heads": 32,
    "num_key_value_heads": 4, "vocab_size": 32000, "rms_norm_eps": 1e-5,
}  # fmt: skip
PROMPTS = [
    "What does a chest X-ray show?", "Name the bones of the forearm.",
    "How is pneumonia treated?", "Explain what an MRI scan is.",
    "What are the symptoms of anaemia?", "Describe the function of the liver.",
    "When is a CT scan with contrast used?", "What is the difference between a virus and a bacterium?",
    "List three causes of chest pain.", "What does the spleen do?",
    "How does insulin work?", "What is a biopsy?",
    "Explain high blood pressure to a child.", "What is an ultrasound used for?",
    "Which organs lie in the abdomen?", "What does a radiologist do?",
    "How long does a broken arm take to heal?", "What is the role of white blood cells?",
    "Write one sentence about the human heart.", "Why are vaccines given twice?",
]  # fmt: skip


@torch.no_grad()
def products() -> None:
    """One matrix of 11264 x 2048, three of each kind in turn, so that none stays in the cache."""
    exact = [torch.randn(11264, 2048).bfloat16() for _ in range(3)]
    rounded = {
        bits: [QuantizedWeight.of(weight, Scheme(bits=bits)) for weight in exact] for bits in (8, 4)
    }
    limits = dict(weight_module.PACKED_TOKENS)
    print("| tokens | bf16, ms | int8 packed | int8 unpacked | int4 packed | int4 unpacked |")
    for tokens in (1, 4, 16, 64, 96, 128, 192, 215):
        inputs = torch.randn(tokens, 2048).bfloat16()

        def multiply(bits: int, is_packed: bool, inputs: Tensor = inputs) -> None:
            weight_module.PACKED_TOKENS[bits] = 10**9 if is_packed else 0
            for weight in rounded[bits]:
                weight.product(inputs)

        runs: dict[str, Callable[[], object]] = {
            "bf16": lambda inputs=inputs: [F.linear(inputs, weight) for weight in exact]
        }
        for bits in (8, 4):
            runs[f"{bits} packed"] = lambda bits=bits: multiply(bits, True)
            runs[f"{bits} unpacked"] = lambda bits=bits: multiply(bits, False)
        found = medians(runs, 5 if tokens <= 16 else 2)
        base = found.pop("bf16")
        ratios = " | ".join(f"{seconds / base:.2f}" for seconds in found.values())
        print(f"| {tokens} | {base / 3 * 1e3:.1f} | {ratios} |", flush=True)
    weight_module.PACKED_TOKENS.update(limits)


CONFIGS = {
    "bfloat16": None,
    "int8": MoellavaQuantizationConfig(bits=8),
    "int4": MoellavaQuantizationConfig(bits=4),
}


def model(num_layers: int = 22) -> None:
    """Tokens/s, bytes and the peak of loading; every second layer is a mixture of four."""
    config = LlamaMoeConfig(**TINYLLAMA, num_hidden_layers=num_layers)
    with tempfile.TemporaryDirectory() as folder:
        torch.set_default_dtype(torch.bfloat16)
        with no_init_weights():
            made = LlamaMoeForCausalLM(config)
        torch.set_default_dtype(torch.float32)
        for parameter in made.parameters():
            torch.nn.init.normal_(parameter.data, std=0.02)
        made.save_pretrained(folder, max_shard_size="1GB")
        del made
        models = {
            name: LlamaMoeForCausalLM.from_pretrained(
                folder, dtype=torch.bfloat16, quantization_config=given
            ).eval()
            for name, given in CONFIGS.items()
        }
        speeds(models)
        del models
        for name in CONFIGS:
            run_process(
                [sys.executable, "-m", "tests.benchmarks.quantization", "peak", folder, name],
                check=True,
            )


@torch.no_grad()
def speeds(models: dict[str, LlamaMoeForCausalLM]) -> None:
    held = weight_bytes(models["bfloat16"])
    for name, made in models.items():
        print(f"{name}: {weight_bytes(made):,} bytes, {weight_bytes(made) / held:.3f}")
    for what, shape, rounds in (
        ("one token, batch 1", (1, 1), 7), ("one token, batch 4", (4, 1), 3), ("215 tokens", (1, 215), 1),
    ):  # fmt: skip
        ids = torch.randint(0, 32000, shape)
        found = medians({name: lambda m=m, ids=ids: m(ids) for name, m in models.items()}, rounds)
        for name, seconds in found.items():
            rate = ids.numel() / seconds
            print(
                f"{what}, {name}: {rate:.2f} tokens/s, {found['bfloat16'] / seconds:.2f}x",
                flush=True,
            )


def peak(folder: str, name: str) -> None:
    """What loading takes at most, by a process of its own, sampled every millisecond.

    Pages of the file, which the system may drop, are left out.
    """
    LlamaMoeForCausalLM(LlamaMoeConfig(num_hidden_layers=1, hidden_size=64, vocab_size=9))
    before, found = own_memory(), []

    def watch() -> None:
        while True:
            found.append(own_memory())
            time.sleep(0.001)

    Thread(target=watch, daemon=True).start()
    LlamaMoeForCausalLM.from_pretrained(
        folder, dtype=torch.bfloat16, quantization_config=CONFIGS[name]
    )
    whole = sum(file.stat().st_size for file in Path(folder).glob("*.safetensors"))
    taken = max(found) - before
    print(f"{name}: loading took {taken / 1e6:.0f} MB, {taken / whole:.3f} of bfloat16's bytes")


def own_memory() -> int:
    text = Path("/proc/self/status").read_text()
    return int(text.split("RssAnon:")[1].split()[0]) * 1024


@torch.no_grad()
def quality(folder: str) -> None:
    """What rounding costs: perplexity over this package's guides, and equal greedy tokens."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.padding_side = "left"
    docs = Path(__file__).parents[2] / "docs"
    text = "\n\n".join((docs / name).read_text() for name in ("mixture_of_experts.md", "data.md"))
    windows = tokenizer(text, return_tensors="pt").input_ids[0].unfold(0, 512, 512)[:12]
    prompts = tokenizer(
        [f"<|im_start|>user\n{prompt}<|im_end|>\n<|im_start|>assistant\n" for prompt in PROMPTS],
        return_tensors="pt",
        padding=True,
    )
    print(f"{windows.numel()} tokens of text; 20 prompts, 32 greedy tokens each")
    with tempfile.TemporaryDirectory() as upcycled:
        upcycle(folder, dtype=torch.float32).save_pretrained(upcycled)
        exact = None
        for name, config in quality_configs():
            made = LlamaMoeForCausalLM.from_pretrained(
                upcycled, dtype=torch.float32, quantization_config=config
            ).eval()
            if config is not None:
                made.dequantize()  # the same numbers, in ordinary products: quicker in float32
            logits = [made(window[None]).logits[0, :-1] for window in windows]
            losses = [
                F.cross_entropy(part, window[1:])
                for part, window in zip(logits, windows, strict=True)
            ]
            tops = torch.stack([part.argmax(-1) for part in logits])
            answers = made.generate(
                **prompts, max_new_tokens=32, min_new_tokens=32, do_sample=False,
                pad_token_id=tokenizer.pad_token_id,
            )[:, prompts.input_ids.shape[1] :]  # fmt: skip
            exact = exact or (tops, answers)
            found = torch.stack(losses).mean().exp().item()
            same = [
                (a == b).float().mean().item() for a, b in zip((tops, answers), exact, strict=True)
            ]
            print(
                f"| {name} | {found:.3f} | {same[0]:.3f} | {same[1]:.3f} |",
                flush=True,
            )


def quality_configs() -> Iterator[tuple[str, MoellavaQuantizationConfig | None]]:
    yield "float32", None
    yield "int8", MoellavaQuantizationConfig(bits=8)
    for group_size in (32, 64, 128):
        if 576 % group_size == 0:
            yield f"int4, {group_size}", MoellavaQuantizationConfig(bits=4, group_size=group_size)


if __name__ == "__main__":
    {"products": products, "model": model, "peak": peak, "quality": quality}[sys.argv[1]](
        *(int(value) if value.isdigit() else value for value in sys.argv[2:])
    )
