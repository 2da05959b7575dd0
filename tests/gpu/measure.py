"""Speed on a GPU against bounds that are measured in the same run; tests/gpu/run starts it.

Each section is a function that gives rows of the table. A section that fails is a row that says so,
and the exit status is 1.
"""

import argparse
import json
import platform
import statistics
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from transformers import StaticCache
from transformers.models.llama.modeling_llama import LlamaMLP

from moellava.model.describe import count_active_parameters
from moellava.model.language_model import LlamaMoeConfig, LlamaMoeForCausalLM
from moellava.model.language_model.moe import LlamaMoeSparseBlock
from moellava.model.quantization import MoellavaQuantizationConfig

MOST_SECONDS = 480  # sections that would start later are left out, and named


@dataclass(frozen=True)
class Sizes:
    """What is measured; the defaults are TinyLlama's."""

    hidden: int = 2048
    intermediate: int = 5632
    layers: int = 22
    heads: int = 32
    kv_heads: int = 4
    vocabulary: int = 32000
    tokens: tuple[int, ...] = (1, 16, 64, 256, 1024, 4096)
    row: int = 2048  # tokens of one row of training
    matmul: int = 8192
    copied: int = 2**30  # numbers
    rounds: int = 10
    tower: str = "vit_base_patch16_224"
    images: int = 64
    new_tokens: int = 64

    def config(self, **fields: object) -> LlamaMoeConfig:
        return LlamaMoeConfig(
            hidden_size=self.hidden,
            intermediate_size=self.intermediate,
            num_hidden_layers=self.layers,
            num_attention_heads=self.heads,
            num_key_value_heads=self.kv_heads,
            vocab_size=self.vocabulary,
            max_position_embeddings=4096,
            **fields,
        )


TINY = Sizes(
    hidden=64,
    intermediate=128,
    layers=2,
    heads=4,
    kv_heads=2,
    vocabulary=500,
    tokens=(1, 16),
    row=32,
    matmul=128,
    copied=2**16,
    rounds=2,
    tower="vit_tiny_patch16_224",
    images=2,
    new_tokens=4,
)


@dataclass(frozen=True)
class Row:
    """One line of the table: a value, and the share of the bound that it reaches."""

    section: str
    what: str
    value: float
    unit: str
    share: float | None = None
    asked: str = ""


@dataclass
class Machine:
    """Where it runs, and what the run has found about it."""

    device: torch.device
    sizes: Sizes
    is_tiny: bool
    flops: float = 0.0  # of a bfloat16 product, per second
    bandwidth: float = 0.0  # bytes per second, read and written
    rows: list[Row] = field(default_factory=list)

    def seconds(self, call: Callable[[], object]) -> float:
        """The median time of a call, after two that are not counted."""
        times = []
        for turn in range(self.sizes.rounds + 2):
            self.wait()
            start = time.perf_counter()
            call()
            self.wait()
            if turn > 1:
                times.append(time.perf_counter() - start)
        return statistics.median(times)

    def wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def model(self, **fields: object) -> LlamaMoeForCausalLM:
        """A mixture in bfloat16 with weights that are drawn on the device."""
        torch.manual_seed(0)
        with self.device:
            model = LlamaMoeForCausalLM(self.sizes.config(**fields)).to(torch.bfloat16)
        for name, weight in model.named_parameters():
            if ".mlp.gate." in name:
                weight.data = weight.data.float()
        return model.eval()

    def ids(self, length: int, rows: int = 1) -> Tensor:
        return torch.randint(3, self.sizes.vocabulary, (rows, length), device=self.device)


def bounds(machine: Machine) -> Iterator[Row]:
    """What the hardware does at best: a large product and a large copy."""
    side = machine.sizes.matmul
    matrix = torch.randn(side, side, device=machine.device, dtype=torch.bfloat16)
    machine.flops = 2 * side**3 / machine.seconds(lambda: matrix @ matrix)
    numbers = torch.zeros(machine.sizes.copied, device=machine.device)
    target = torch.empty_like(numbers)
    num_bytes = 2 * 4 * machine.sizes.copied
    machine.bandwidth = num_bytes / machine.seconds(lambda: target.copy_(numbers))
    yield Row("bounds", f"product of {side} x {side}, bfloat16", machine.flops / 1e12, "TFLOP/s")
    yield Row("bounds", "copy of float32", machine.bandwidth / 1e9, "GB/s")


@torch.no_grad()
def block(machine: Machine) -> Iterator[Row]:
    """The sparse block against one dense pass for each expert hit, over just its tokens."""
    config = machine.sizes.config()
    with machine.device:
        ours = LlamaMoeSparseBlock(config).to(torch.bfloat16)
        mlp = LlamaMLP(config).to(torch.bfloat16)
    for weight in ours.parameters():
        nn.init.normal_(weight, std=0.02)
    ours.gate.float()
    for num_tokens in machine.sizes.tokens:
        x = torch.randn(1, num_tokens, config.hidden_size, device=machine.device).bfloat16()
        flat = x.flatten(0, 1)
        _, _, index = ours.gate(flat)
        parts = [flat[(index == expert).any(-1)] for expert in index.unique().tolist()]
        dense = machine.seconds(partial(lambda parts: [mlp(part) for part in parts], parts))
        for name in ("fastest", "grouped_mm", "batched_mm", "eager"):
            if name == "batched_mm" and num_tokens > 64:  # a copy of the weights for each
                continue
            config._experts_implementation = name
            seconds = machine.seconds(partial(ours, x))
            yield Row(
                "block",
                f"forward of {num_tokens} tokens, {name}",
                1e6 * seconds,
                "us",
                seconds / dense,
                "<= 1.15" if name == "fastest" and num_tokens >= 16 else "",
            )


def training(machine: Machine) -> Iterator[Row]:
    """One step of AdamW in bfloat16; 6 FLOP for each active weight and token."""
    model = machine.model().train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5)
    ids = machine.ids(machine.sizes.row, rows=1 if machine.is_tiny else 4)

    def step() -> None:
        model(ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    seconds = machine.seconds(step)
    flops = 6 * count_active_parameters(model) * ids.numel() / seconds
    what = f"step of {len(ids)} rows of {machine.sizes.row} tokens"
    yield Row("training", what, ids.numel() / seconds, "tokens/s", flops / machine.flops, ">= 0.35")


@torch.no_grad()
def decode(machine: Machine) -> Iterator[Row]:
    """One token a step with a static cache, plain and compiled, against reading the weights."""
    model = machine.model()
    share = model.config.num_experts_per_tok / model.config.num_experts
    read = sum(
        weight.numel() * weight.element_size() * (share if ".experts." in name else 1)
        for name, weight in model.named_parameters()
        if "embed_tokens" not in name
    )
    # A copy reads and writes; decoding only reads.
    bound = machine.bandwidth / read
    backend = "eager" if machine.is_tiny else "inductor"
    mode = None if machine.is_tiny else "reduce-overhead"
    compiled = torch.compile(model, fullgraph=True, dynamic=False, backend=backend, mode=mode)
    for name, forward in (("plain", model), ("compiled", compiled)):
        cache = StaticCache(config=model.config, max_cache_len=512)
        model(machine.ids(16), cache=cache, use_cache=True)
        ids, where = machine.ids(1), torch.full((1, 1), 16, device=machine.device)
        options = {"position_ids": where, "cache": cache, "use_cache": True}
        seconds = machine.seconds(partial(forward, ids, **options))
        asked = ">= 0.6" if name == "compiled" else ""
        what = f"batch 1, static cache, {name}"
        yield Row("decode", what, 1 / seconds, "tokens/s", 1 / seconds / bound, asked)


def fsdp(machine: Machine) -> Iterator[Row]:
    """FSDP2 on one device, by NCCL on a GPU, in float32: the loss is that of the whole model."""
    ids = machine.ids(machine.sizes.row)
    model = machine.model().float()  # one dtype: routers are float32 in any case
    with torch.no_grad():
        expected = float(model(ids, labels=ids).loss)
    model.train()
    with tempfile.TemporaryDirectory() as folder:
        dist.init_process_group(
            "nccl" if machine.device.type == "cuda" else "gloo",
            init_method=f"file://{folder}/store",
            rank=0,
            world_size=1,
        )
        try:
            mesh = init_device_mesh(machine.device.type, (1,))
            for layer in model.model.layers:
                fully_shard(layer, mesh=mesh)
            fully_shard(model, mesh=mesh)
            seconds = machine.seconds(lambda: model(ids, labels=ids).loss.backward())
            with torch.no_grad():
                found = float(model.eval()(ids, labels=ids).loss)
        finally:
            dist.destroy_process_group()
    if abs(found - expected) > 1e-4 * expected:
        raise ValueError(f"the loss is {found}, and {expected} without FSDP")
    what = f"forward and backward of {machine.sizes.row} tokens"
    yield Row("fsdp", what, ids.numel() / seconds, "tokens/s")


@torch.no_grad()
def quantized(machine: Machine) -> Iterator[Row]:
    """Decoding with weights of 8 and 4 bits against bfloat16, each without compilation."""
    with tempfile.TemporaryDirectory() as folder:
        machine.model().save_pretrained(folder)
        rates = {}
        for name, config in (
            ("bfloat16", None),
            ("int8", MoellavaQuantizationConfig(bits=8)),
            ("int4", MoellavaQuantizationConfig(bits=4)),
        ):
            model = LlamaMoeForCausalLM.from_pretrained(
                folder, dtype="bfloat16", quantization_config=config, device_map=str(machine.device)
            )
            rates[name] = 1 / machine.seconds(partial(model, machine.ids(1)))
    for name in ("int8", "int4"):
        yield Row(
            "quantized",
            f"{name}, one token",
            rates[name],
            "tokens/s",
            rates[name] / rates["bfloat16"],
        )


def answers(machine: Machine) -> Iterator[Row]:
    """`LoadedModel.answer`, from pictures to text, one question and 32 at once."""
    from moellava.model.builder_enhanced import load_pretrained_model
    from moellava.testing import write_biomedclip, write_tinyllama
    from moellava.testing.datasets import picture

    sizes = machine.sizes
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_biomedclip(folder / "biomedclip", vision=sizes.tower)
        write_tinyllama(
            folder / "language_model",
            hidden_size=sizes.hidden,
            intermediate_size=sizes.intermediate,
            num_hidden_layers=sizes.layers,
            num_attention_heads=sizes.heads,
            num_key_value_heads=sizes.kv_heads,
        )
        parts = {
            "model_name_or_path": str(folder / "language_model"),
            "mm_vision_tower": str(folder / "biomedclip"),
        }
        loaded = load_pretrained_model(parts, device=machine.device)
    options = {"max_new_tokens": sizes.new_tokens, "min_new_tokens": sizes.new_tokens}
    for batch in (1, 32):
        images = [picture(seed, size=(512, 512)) for seed in range(batch)]
        questions = ["Is this a CT image?"] * batch
        seconds = machine.seconds(partial(loaded.answer, images, questions, **options))
        yield Row("answers", f"batch {batch}", batch * sizes.new_tokens / seconds, "tokens/s")


@torch.inference_mode()
def encoder(machine: Machine) -> Iterator[Row]:
    """Patch tokens in bfloat16 against open_clip's own `encode_image`, in bfloat16 too."""
    import open_clip

    from moellava.encoders import BiomedClipEncoder
    from moellava.testing import BIOMEDBERT, write_biomedbert, write_biomedclip

    with tempfile.TemporaryDirectory() as folder:
        repo = write_biomedclip(Path(folder) / "biomedclip", vision=machine.sizes.tower)
        # open_clip builds the text tower too: it is to look for that here, and not on the hub.
        config_file = repo / "open_clip_config.json"
        text = str(write_biomedbert(Path(folder) / "biomedbert"))
        config_file.write_text(config_file.read_text().replace(BIOMEDBERT, text))
        ours = BiomedClipEncoder.from_pretrained(
            repo, dtype=torch.bfloat16, device=machine.device
        ).eval()
        theirs, _ = open_clip.create_model_from_pretrained(f"local-dir:{repo}")
    theirs = theirs.to(machine.device, torch.bfloat16).eval()
    pixels = torch.randn(machine.sizes.images, 3, 224, 224, device=machine.device).bfloat16()
    seconds = machine.seconds(lambda: ours(pixels))
    ratio = machine.seconds(lambda: theirs.encode_image(pixels)) / seconds
    what = f"batch of {machine.sizes.images}, bfloat16"
    yield Row("encoder", what, machine.sizes.images / seconds, "images/s", ratio, ">= 1.05")


def skipped_tests(machine: Machine) -> Iterator[Row]:
    """The tests that are skipped without a GPU; on a CPU there are none to run."""
    if machine.device.type != "cuda":
        return
    words = [sys.executable, "-m", "pytest", "-q", "-m", "gpu", "tests"]
    done = subprocess.run(words, capture_output=True, text=True)
    summary = done.stdout.strip().splitlines()[-1]
    if done.returncode:
        raise ValueError(f"pytest -m gpu: {summary}")
    yield Row("tests", summary, float(done.returncode), "exit status")


SECTIONS = (bounds, block, training, decode, fsdp, quantized, answers, encoder, skipped_tests)


def run(machine: Machine) -> list[str]:
    """Run every section, filling the machine's rows; what failed or was left out."""
    problems = []
    start = time.perf_counter()
    for section in SECTIONS:
        if time.perf_counter() - start > MOST_SECONDS:
            problems.append(f"{section.__name__}: left out, {MOST_SECONDS} s are over")
            continue
        try:
            for row in section(machine):
                machine.rows.append(row)
                share = "" if row.share is None else f"{row.share:.2f}"
                value = f"{row.value:.4g} {row.unit}"
                print(
                    f"| {row.section} | {row.what} | {value} | {share} | {row.asked} |", flush=True
                )
        except Exception as error:  # the other sections are worth a run
            traceback.print_exc()
            problems.append(f"{section.__name__}: {type(error).__name__}: {error}")
            print(f"| {section.__name__} | failed | | | |", flush=True)
        if machine.device.type == "cuda":
            torch.cuda.empty_cache()
    return problems


def main(words: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--tiny", action="store_true", help="toy sizes: does it run?")
    parser.add_argument("--json", type=Path, help="the same rows, for programs")
    given = parser.parse_args(words)
    device = torch.device(given.device)
    if device.type == "cuda" and not torch.cuda.is_available():
        parser.error("there is no CUDA device; --device cpu --tiny runs the same code at toy size")
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.machine()
    print(f"{name}, torch {torch.__version__}\n")
    print("| section | what | value | share of the bound or rival | asked |\n|---|---|---|---|---|")
    machine = Machine(device, TINY if given.tiny else Sizes(), given.tiny)
    problems = run(machine)
    if given.json:
        rows = [asdict(row) for row in machine.rows]
        found = {"device": name, "torch": torch.__version__, "rows": rows, "problems": problems}
        given.json.write_text(json.dumps(found, indent=2) + "\n")
    if problems:
        sys.exit("\n".join(problems))


if __name__ == "__main__":
    main()
