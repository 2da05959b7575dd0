"""A model and data so small that a stage takes a second.

For the tests and the processes that they start.
"""

import json
from pathlib import Path

import numpy as np
from PIL import Image

from moellava.model.builder_enhanced import load_pretrained_model
from moellava.testing import write_biomedclip, write_tinyllama
from moellava.train import load_recipe


def write_tiny(folder: Path, num_rows: int = 20) -> Path:
    """Parts, images and rows in `folder`; every fourth row has no image, lengths vary."""
    write_biomedclip(folder / "biomedclip_tiny", vision="test_vit", image_size=32)
    write_tinyllama(
        folder / "tinyllama_tiny",
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        vocab_size=420,
    )
    rng = np.random.default_rng(0)
    (folder / "images").mkdir()
    rows = []
    for index in range(num_rows):
        question = "Is this a CT image? " + "Why? " * int(rng.integers(1, 12))
        row = {"id": f"row{index}", "modality": ("CT", "MR", "US", "histology")[index % 4]}
        if index % 4:
            pixels = rng.integers(0, 256, (40, 40, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(folder / "images" / f"{index}.png")
            row["image"], question = f"{index}.png", f"<image>\n{question}"
        answer = str(rng.choice(["yes", "no", "the lungs"]))
        row["conversations"] = [
            {"from": "human", "value": question},
            {"from": "gpt", "value": answer},
        ]
        rows.append(row)
    (folder / "rows.json").write_text(json.dumps(rows))
    return folder


def parts_of(tiny: Path) -> dict[str, str]:
    return {
        "model_name_or_path": str(tiny / "tinyllama_tiny"),
        "mm_vision_tower": str(tiny / "biomedclip_tiny"),
    }


def tiny_settings(tiny: Path) -> dict:
    """The sections of a recipe on the tiny data."""
    return {
        "data": {
            "train": str(tiny / "rows.json"),
            "images": str(tiny / "images"),
            "num_workers": 0,
        },
        "optim": {
            "learning_rate": 1e-2,
            "batch_size": 4,
            "per_device_batch_size": 4,
            "max_steps": 8,
            "precision": "fp32",
        },
        "logging": {"report_to": []},
        "saving": {"every": 2},
    }


def tiny_recipe(tiny: Path, stage: str, out: Path, *overrides: str, **more):
    """A recipe on the tiny data; from the parts, whatever the stage, unless it has a start."""
    settings = {"stage": stage, "output_dir": str(out), **tiny_settings(tiny), **more}
    if "start_from" not in more:
        settings |= {"after": "any", "model": more.get("model", parts_of(tiny))}
    return load_recipe(settings, overrides)


def experts_recipe(tiny: Path, dense: Path, out: Path, *overrides: str, **more):
    """Stage `experts` from the run of the fixture `dense`."""
    settings = {"start_from": str(dense), "moe": {"config": {"num_experts": 4}}, **more}
    return tiny_recipe(tiny, "experts", out, *overrides, **settings)


def losses(result):
    return [entry["loss"] for entry in result.log if "loss" in entry]


def model_weights(result):
    return load_pretrained_model(result.model_folder).model.state_dict()
