"""The mixture at TinyLlama's real sizes, as ratios to a bound or a rival measured in the same run.

    python tests/benchmarks/language_model.py {block,decode,upcycle,training}

Times are medians of interleaved rounds. `decode` and `upcycle` need about 7 GB of memory,
the others 3.
"""

import argparse
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
import transformers
from torch import Tensor
from transformers import (
    DynamicCache,
    LlamaConfig,
    LlamaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
)
from transformers.initialization import no_init_weights
from transformers.models.llama.modeling_llama import LlamaMLP
from transformers.models.mixtral.modeling_mixtral import MixtralSparseMoeBlock

from moellava.model.language_model import (
    LlamaMoeConfig,
    LlamaMoeForCausalLM,
    moe_config_from_dense,
    upcycle,
)
from moellava.model.language_model.moe import LlamaMoeSparseBlock

TINYLLAMA = {
    "hidden_size": 2048, "intermediate_size": 5632, "num_hidden_layers": 22, "num_attention_heads": 32,
    "num_key_value_heads": 4, "vocab_size": 32000, "rms_norm_eps": 1e-5,
}  # fmt: skip


# Experts, width, top-k: the default of this library, and many small ones.
BLOCKS = ((4, 5632, 2), (16, 1408, 4), (64, 704, 8))


def medians(runs: dict[str, Callable[[], object]], rounds: int) -> dict[str, float]:
    """Seconds per run; the runs take turns, so that a slow moment of the machine meets all of them."""
    times: dict[str, list[float]] = {name: [] for name in runs}
    for round_index in range(rounds + 1):
        for name, run in runs.items():
            start = time.perf_counter()
            run()
            if round_index > 0:  # the first one warms up
                times[name].append(time.perf_counter() - start)
    return {name: sorted(values)[len(values) // 2] for name, values in times.items()}


# --- the sparse block
# ---------------------------------------------------------------------------------------------


def bench_block(dtypes: tuple[torch.dtype, ...]) -> None:
    """Against one LlamaMLP pass for each expert hit, over just its tokens, and against Mixtral's
    block.
    """
    print(
        "| E x I, top-k | dtype | tokens | experts hit | bound, ms | ours fwd | Mixtral fwd | "
        "bound, ms | ours fwd+bwd | Mixtral |"
    )
    print("|---|---|---|---|---|---|---|---|---|---|")
    for shape in BLOCKS:
        for dtype in dtypes:
            ours, mixtral, mlps = make_blocks(dtype, *shape)
            for num_tokens in (1, 4, 16, 64, 256, 2048):
                rounds = {1: 15, 4: 15, 16: 9, 64: 9, 256: 9, 2048: 3}[num_tokens]
                x = torch.randn(1, num_tokens, 2048).to(dtype)
                parts = tokens_of_experts(ours, x)
                forward = medians(
                    block_runs(ours, mixtral, mlps, x, parts, with_backward=False), rounds
                )
                with_backward = block_runs(ours, mixtral, mlps, x, parts, with_backward=True)
                row = [
                    "{} x {}, top-{}".format(*shape),
                    str(dtype).removeprefix("torch."),
                    num_tokens,
                    len(parts),
                    *ratios(forward),
                    *ratios(medians(with_backward, max(3, rounds // 3))),
                ]
                print("| " + " | ".join(map(str, row)) + " |", flush=True)


def ratios(seconds: dict[str, float]) -> list[str]:
    bound = seconds["bound"]
    return [
        f"{bound * 1e3:.1f}",
        f"{seconds['ours'] / bound:.2f}",
        f"{seconds['mixtral'] / bound:.2f}",
    ]


def make_blocks(
    dtype: torch.dtype, num_experts: int, width: int, top_k: int
) -> tuple[LlamaMoeSparseBlock, MixtralSparseMoeBlock, list[LlamaMLP]]:
    shape = {**TINYLLAMA, "intermediate_size": width, "num_experts_per_tok": top_k}
    config = LlamaMoeConfig(**shape, num_experts=num_experts)
    config._experts_implementation = "fastest"
    ours = LlamaMoeSparseBlock(config)
    with torch.no_grad():
        for parameter in ours.parameters():
            parameter.uniform_(-0.03, 0.03)
    ours.experts.to(dtype)
    mixtral_config = MixtralConfig(**shape, num_local_experts=num_experts)
    mixtral_config._experts_implementation = "grouped_mm"
    with torch.device("meta"):
        mixtral = MixtralSparseMoeBlock(mixtral_config)
    mixtral.load_state_dict(ours.state_dict(), assign=True)
    mixtral.gate.to(dtype)  # as Mixtral's own model has it
    mlps = []
    for expert in range(num_experts):
        with torch.device("meta"):
            mlp = LlamaMLP(config)
        gate, up = ours.experts.gate_up_proj.data[expert].chunk(2)
        down = ours.experts.down_proj.data[expert]
        mlp.load_state_dict(
            {"gate_proj.weight": gate, "up_proj.weight": up, "down_proj.weight": down}, assign=True
        )
        mlps.append(mlp.requires_grad_())
    return ours, mixtral, mlps


def tokens_of_experts(block: LlamaMoeSparseBlock, x: Tensor) -> list[tuple[int, Tensor]]:
    tokens = x.reshape(-1, x.shape[-1])
    _, _, index = block.gate(tokens)
    chosen = ((index == expert).any(-1) for expert in range(block.experts.num_experts))
    return [(expert, tokens[rows]) for expert, rows in enumerate(chosen) if rows.any()]


def block_runs(ours, mixtral, mlps, x, parts, *, with_backward):  # type: ignore[no-untyped-def]
    def run(module: torch.nn.Module, batch: Tensor) -> None:
        if not with_backward:
            with torch.no_grad():
                module(batch)
            return
        module.zero_grad(set_to_none=True)
        module(batch.detach().requires_grad_()).sum().backward()

    def bound() -> None:
        for expert, tokens in parts:
            run(mlps[expert], tokens)

    return {"bound": bound, "ours": lambda: run(ours, x), "mixtral": lambda: run(mixtral, x)}


# --- decoding -------------------------------------------------------------------------------------
# ----------------


def bench_decode() -> None:
    """One token a step, batch 1, bfloat16, against the read bandwidth and against a Mixtral of the
    same size.
    """
    model = build(LlamaMoeForCausalLM, LlamaMoeConfig(**TINYLLAMA))
    num_bytes, reads = memory_reads()
    seconds = medians({**reads, "ours": decode_step(model), "products": products(model)}, 9)
    bandwidth = num_bytes / min(seconds[name] for name in reads)
    bound = active_bytes(model) / bandwidth
    print(
        f"read bandwidth {bandwidth / 1e9:.1f} GB/s (the better of a float32 sum and a bfloat16 matrix-vector product)"
    )
    print(
        f"11 of 22 layers sparse: {1 / seconds['ours']:.2f} tokens/s, {bound / seconds['ours']:.2f} of {1 / bound:.2f}"
    )
    print(
        f"{seconds['products'] / seconds['ours']:.2f} of the tokens/s of torch's products of the same weights alone"
    )
    del model

    # Every layer sparse, as Mixtral's must be, and the width that gives the same number of weights.
    same_size = {**TINYLLAMA, "intermediate_size": 3520}
    ours = build(LlamaMoeForCausalLM, LlamaMoeConfig(**same_size, moe_layers="dense"))
    with torch.device("meta"):
        mixtral = MixtralForCausalLM(MixtralConfig(**same_size, num_local_experts=4))
    mixtral.load_state_dict(ours.state_dict(), assign=True)
    mixtral.model.rotary_emb = ours.model.rotary_emb
    mixtral.to(torch.bfloat16).eval()
    both = medians({"ours": decode_step(ours), "mixtral": decode_step(mixtral)}, 9)
    print(
        f"all 22 layers sparse: {both['mixtral'] / both['ours']:.2f} of Mixtral's tokens/s ({1 / both['mixtral']:.2f})"
    )


def build(cls: type, config: LlamaConfig, dtype: torch.dtype = torch.bfloat16) -> LlamaForCausalLM:
    """A model with cheap weights that are really in memory; the router's are random."""
    default = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    with no_init_weights():
        model = cls(config)
    torch.set_default_dtype(default)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "mlp.gate." in name or "embed" in name:
                parameter.data = (
                    torch.randn(parameter.shape, dtype=torch.float32 if "gate" in name else dtype)
                    * 0.02
                )
            else:
                parameter.fill_(1e-3 if parameter.dim() > 1 else 1.0)
    return model.eval()


def decode_step(model: LlamaForCausalLM) -> Callable[[], None]:
    cache = DynamicCache(config=model.config)
    generator = torch.Generator().manual_seed(0)

    @torch.no_grad()
    def step() -> None:
        ids = torch.randint(0, 32000, (1, 1), generator=generator)
        model(ids, cache=cache, use_cache=True)

    return step


def products(model: LlamaMoeForCausalLM) -> Callable[[], None]:
    """One `F.linear` of one row with each matrix that a token uses: what decoding costs torch, were
    there no model.
    """
    matrices: list[Tensor] = []
    for name, weight in model.named_parameters():
        if ".experts." in name:
            matrices += weight.detach()[: model.config.num_experts_per_tok]
        elif weight.dim() == 2 and "embed_tokens" not in name:
            matrices.append(weight.detach())
    rows = {
        (matrix.shape[1], matrix.dtype): torch.ones(1, matrix.shape[1], dtype=matrix.dtype)
        for matrix in matrices
    }

    def run() -> None:
        for matrix in matrices:
            F.linear(rows[matrix.shape[1], matrix.dtype], matrix)

    return run


def active_bytes(model: LlamaMoeForCausalLM) -> float:
    share = model.config.num_experts_per_tok / model.config.num_experts
    return sum(
        parameter.numel() * parameter.element_size() * (share if ".experts." in name else 1.0)
        for name, parameter in model.named_parameters()
        if "embed_tokens" not in name
    )


def memory_reads() -> tuple[int, dict[str, Callable[[], object]]]:
    """Ways to read so many bytes once."""
    matrix = torch.full((64 * 1024, 4096), 1e-3, dtype=torch.bfloat16)  # 512 MiB
    vector = torch.ones(1, 4096, dtype=torch.bfloat16)
    runs = {
        "sum": lambda: matrix.view(torch.float32).sum(),
        "product": lambda: F.linear(vector, matrix),
    }
    return matrix.numel() * 2, runs


# --- upcycling ------------------------------------------------------------------------------------
# ----------------


def bench_upcycle() -> None:
    """Seconds against reading the file and writing the model's bytes once; peak memory against the
    model's bytes.
    """
    for dtype in (torch.bfloat16, torch.float32):
        with tempfile.TemporaryDirectory() as folder:
            build(LlamaForCausalLM, LlamaConfig(**TINYLLAMA), dtype).save_pretrained(folder)
            print(f"from a {dtype} file:", flush=True)
            subprocess.run([sys.executable, __file__, "upcycle-once", folder], check=True)


def upcycle_once(folder: str) -> None:
    LlamaMoeForCausalLM(
        moe_config_from_dense(LlamaConfig(num_hidden_layers=1, hidden_size=64, vocab_size=9))
    )  # imports
    base = peak_rss()
    start = time.perf_counter()
    model = upcycle(folder, dtype=torch.bfloat16)
    sum(
        float(parameter.detach().view(-1)[::1024].sum()) for parameter in model.parameters()
    )  # touch every mapped page
    seconds = time.perf_counter() - start
    size = sum(parameter.numel() * parameter.element_size() for parameter in model.parameters())
    peak = peak_rss() - base
    del model
    start = time.perf_counter()
    buffer = bytearray(1 << 26)
    with (Path(folder) / "model.safetensors").open("rb") as file:
        while file.readinto(buffer):
            pass
    for _ in range(size // (1 << 28)):
        torch.empty(1 << 28, dtype=torch.uint8).fill_(1)
    bound = time.perf_counter() - start
    print(f"  {seconds:.1f} s, {seconds / bound:.2f} x reading and writing ({bound:.1f} s)")
    print(
        f"  peak {peak / 1e6:.0f} MB, {peak / size:.3f} x the model's {size / 1e6:.0f} MB",
        flush=True,
    )


def peak_rss() -> int:
    """Bytes. Not `getrusage`: a child starts with its parent's maximum there."""
    status = Path("/proc/self/status").read_text()
    return int(status.split("VmHWM:")[1].split()[0]) * 1024


# --- training -------------------------------------------------------------------------------------
# ----------------


def bench_training() -> None:
    """Four layers at real width, float32, 128 tokens: against the dense model, by active and by
    held weights.
    """
    found = {}
    for kind in ("dense", "mixture"):
        done = subprocess.run(
            [sys.executable, __file__, f"train-{kind}"], check=True, capture_output=True, text=True
        )
        found[kind] = [float(value) for value in done.stdout.split()]
    (seconds, peak, held, active), (moe_seconds, moe_peak, moe_held, moe_active) = (
        found["dense"],
        found["mixture"],
    )
    time_ratio, memory_ratio = moe_seconds / seconds, moe_peak / peak
    print(f"time {time_ratio:.2f} x dense; active weights {moe_active / active:.2f} x; so", end=" ")
    print(f"{time_ratio / (moe_active / active):.2f} x what the active weights ask for")
    print(f"peak {memory_ratio:.2f} x dense; held weights {moe_held / held:.2f} x; so", end=" ")
    print(f"{memory_ratio / (moe_held / held):.2f} x what the held weights ask for")


def train_once(kind: str) -> None:
    fields = {**TINYLLAMA, "num_hidden_layers": 4}
    mixture = kind == "mixture"
    base = peak_rss()
    if mixture:
        model = build(LlamaMoeForCausalLM, LlamaMoeConfig(**fields), torch.float32)
    else:
        model = build(LlamaForCausalLM, LlamaConfig(**fields), torch.float32)
    model.train()
    ids = torch.randint(0, 32000, (1, 128))

    def step() -> None:
        model.zero_grad(set_to_none=True)
        model(ids, labels=ids, use_cache=False).loss.backward()

    seconds = medians({"step": step}, 15)["step"]
    held = sum(parameter.numel() for parameter in model.parameters())
    embedding = model.get_input_embeddings().weight.numel()
    active = active_bytes(model) / 4 if mixture else held - embedding
    print(seconds, peak_rss() - base, held, active)


SECTIONS = {
    "block": bench_block,
    "decode": bench_decode,
    "upcycle": bench_upcycle,
    "training": bench_training,
}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    internal = ("upcycle-once", "train-dense", "train-mixture")
    parser.add_argument(
        "section", choices=(*SECTIONS, *internal), metavar=f"{{{','.join(SECTIONS)}}}"
    )
    parser.add_argument("folder", nargs="?", help=argparse.SUPPRESS)
    dtypes = {"float32": torch.float32, "bfloat16": torch.bfloat16}
    parser.add_argument("--dtype", choices=dtypes, help="of the section `block`; both unless given")
    arguments = parser.parse_args()
    chosen = (dtypes[arguments.dtype],) if arguments.dtype else tuple(dtypes.values())
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    torch.manual_seed(0)
    if arguments.section == "upcycle-once":
        upcycle_once(arguments.folder)
    elif arguments.section.startswith("train-"):
        train_once(arguments.section.removeprefix("train-"))
    else:
        print(
            f"{arguments.section}: torch {torch.__version__}, transformers {transformers.__version__}, "
            f"{torch.get_num_threads()} threads, {platform.machine()}"
        )
        SECTIONS[arguments.section](*([chosen] if arguments.section == "block" else []))


if __name__ == "__main__":
    main()
