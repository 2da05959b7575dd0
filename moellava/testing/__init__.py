"""Tests and demos without a hub: stand-in weights in the real file layouts, and a network guard.

In the package rather than under `tests/`, because `moellava demo` builds its parts with the same
writers, and because whoever writes code on moellava needs them to test it offline.
"""

from moellava.testing.bits import in_fresh_memory
from moellava.testing.datasets import (
    DATASETS,
    write_medmnist,
    write_omnimedvqa,
    write_path_vqa,
    write_pmc_vqa,
    write_slake,
    write_vqa_rad,
    write_vqa_rad_authors,
)
from moellava.testing.hub import (
    BIOMEDCLIP,
    LLAVA,
    OPENAI_CLIP,
    OPENAI_CLIP_336,
    REVISION,
    SMOLLM2,
    STAND_INS,
    TINYLLAMA,
    VICUNA,
    blocked_network,
    fill_dataset_cache,
    fill_hub_cache,
)
from moellava.testing.language_models import write_smollm2, write_tinyllama
from moellava.testing.llava import write_llava, write_llava_next
from moellava.testing.towers import (
    BIOMEDBERT,
    write_biomedbert,
    write_biomedclip,
    write_openai_clip,
)

__all__ = [
    "BIOMEDBERT",
    "BIOMEDCLIP",
    "DATASETS",
    "LLAVA",
    "OPENAI_CLIP",
    "OPENAI_CLIP_336",
    "REVISION",
    "SMOLLM2",
    "STAND_INS",
    "TINYLLAMA",
    "VICUNA",
    "blocked_network",
    "fill_dataset_cache",
    "fill_hub_cache",
    "in_fresh_memory",
    "write_biomedbert",
    "write_biomedclip",
    "write_llava",
    "write_llava_next",
    "write_medmnist",
    "write_omnimedvqa",
    "write_openai_clip",
    "write_path_vqa",
    "write_pmc_vqa",
    "write_slake",
    "write_smollm2",
    "write_tinyllama",
    "write_vqa_rad",
    "write_vqa_rad_authors",
]
