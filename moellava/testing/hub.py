"""A hub cache filled with stand-ins under the real repo ids, and a guard against network use."""

import socket
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from unittest import mock

from moellava.testing.datasets import DATASETS
from moellava.testing.language_models import write_smollm2, write_tinyllama
from moellava.testing.llava import write_llava
from moellava.testing.towers import (
    BIOMEDBERT,
    write_biomedbert,
    write_biomedclip,
    write_openai_clip,
)

BIOMEDCLIP = "microsoft/BiomedCLIP-PubMedBERT_256-vit_base_patch16_224"
TINYLLAMA = "TinyLlama/TinyLlama-1.1B-Chat-v1.0"
SMOLLM2 = "HuggingFaceTB/SmolLM2-135M-Instruct"
OPENAI_CLIP = "openai/clip-vit-base-patch32"
LLAVA = "llava-hf/llava-1.5-7b-hf"
# What LLaVA-1.5 was made of.
VICUNA = "lmsys/vicuna-7b-v1.5"
OPENAI_CLIP_336 = "openai/clip-vit-large-patch14-336"

STAND_INS: dict[str, Callable[..., Path]] = {
    BIOMEDCLIP: write_biomedclip,
    BIOMEDBERT: write_biomedbert,
    TINYLLAMA: write_tinyllama,
    SMOLLM2: write_smollm2,
    OPENAI_CLIP: write_openai_clip,
    LLAVA: write_llava,
    VICUNA: write_tinyllama,
    OPENAI_CLIP_336: partial(write_openai_clip, image_size=336, patch_size=14),
}

# A snapshot is named by its commit; the hub accepts any 40 hex digits.
REVISION = "0123456789abcdef0123456789abcdef01234567"


def fill_hub_cache(
    cache_dir: Path, repo_ids: Iterable[str] = tuple(STAND_INS), **options: object
) -> dict[str, Path]:
    """Write stand-ins into `cache_dir` in the layout of `HF_HUB_CACHE`; user code runs unchanged.

    Use it with the environment variables `HF_HUB_CACHE=<cache_dir>` and `HF_HUB_OFFLINE=1`, set
    before huggingface_hub is imported.

    Args:
        repo_ids: keys of `STAND_INS`.
        **options: passed to the writer; only with a single repo id.

    Returns:
        The snapshot folder of each repo id.
    """
    repo_ids = list(repo_ids)
    if options and len(repo_ids) != 1:
        raise ValueError(
            f"Options {sorted(options)} go to one writer, but {len(repo_ids)} repo ids were given."
        )
    return {repo_id: _write_snapshot(cache_dir, repo_id, **options) for repo_id in repo_ids}


def fill_dataset_cache(
    cache_dir: Path, repo_ids: Iterable[str] = tuple(DATASETS)
) -> dict[str, Path]:
    """Write stand-ins of published datasets into `cache_dir`, as `fill_hub_cache` does with models.

    Returns:
        The snapshot folder of each repo id of `DATASETS`.
    """
    return {
        repo_id: _place_snapshot(cache_dir, "datasets", repo_id, DATASETS[repo_id])
        for repo_id in repo_ids
    }


@contextmanager
def blocked_network() -> Iterator[None]:
    """Make every attempt to open a socket or to look up a host a `RuntimeError` in this context."""

    def refuse(*args: object, **kwargs: object) -> None:
        raise RuntimeError(f"The network was used, but none is needed: {args[1:] or args}")

    with (
        mock.patch.object(socket.socket, "connect", refuse),
        mock.patch.object(socket.socket, "connect_ex", refuse),
        mock.patch.object(socket, "getaddrinfo", refuse),
    ):
        yield


def _write_snapshot(cache_dir: Path, repo_id: str, **options: object) -> Path:
    return _place_snapshot(cache_dir, "models", repo_id, STAND_INS[repo_id], **options)


def _place_snapshot(
    cache_dir: Path, kind: str, repo_id: str, write: Callable[..., Path], **options: object
) -> Path:
    repo = cache_dir / f"{kind}--{repo_id.replace('/', '--')}"
    snapshot = write(repo / "snapshots" / REVISION, **options)
    (repo / "refs").mkdir(exist_ok=True)
    (repo / "refs" / "main").write_text(REVISION)
    return snapshot
