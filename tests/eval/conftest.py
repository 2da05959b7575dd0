"""A tiny model and rows with several questions per image, for the tests that ask one."""

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from moellava import load_pretrained_model
from moellava.data import read_rows
from tests.train.tiny import parts_of, write_tiny

QUESTIONS = [
    ("Is this a CT image?", "yes", "CLOSED"),
    ("Is the heart enlarged, and if so, by how much in the frontal view?", "no", "CLOSED"),
    ("Which organ is shown?", "left lung", "OPEN"),
    ("What is seen in the upper left part of this image, in a few words?", "a mass", "OPEN"),
]


@pytest.fixture(scope="session")
def eval_folder(tmp_path_factory) -> Path:
    """`questions.json`: seven images with four questions each, mixed, and a row without."""
    folder = write_tiny(tmp_path_factory.mktemp("eval"))
    rng = np.random.default_rng(1)
    rows = []
    for number, (text, truth, kind) in enumerate(QUESTIONS):
        for image in range(7):
            pixels = rng.integers(0, 256, (48, 40, 3), dtype=np.uint8)
            path = folder / "images" / f"scan{image}.png"
            if not path.exists():
                Image.fromarray(pixels).save(path)
            rows.append(
                {
                    "id": f"{image}-{number}",
                    "image": f"scan{image}.png",
                    "answer_type": kind,
                    "modality": "CT" if image < 4 else "MR",
                    "conversations": [
                        {"from": "human", "value": f"<image>\n{text}"},
                        {"from": "gpt", "value": truth},
                    ],
                }
            )
    rows.append(
        {
            "id": "text",
            "conversations": [
                {"from": "human", "value": "What does CT mean?"},
                {"from": "gpt", "value": "computed tomography"},
                {"from": "human", "value": "Is it an X-ray method?"},
                {"from": "gpt", "value": "yes"},
            ],
        }
    )
    (folder / "questions.json").write_text(json.dumps(rows))
    return folder


@pytest.fixture(scope="session")
def eval_rows(eval_folder):
    return read_rows(eval_folder / "questions.json", images=eval_folder / "images")


@pytest.fixture(scope="session")
def tiny_loaded(eval_folder):
    return load_pretrained_model(parts_of(eval_folder), dtype="float32")


@pytest.fixture(scope="session")
def eval_checkpoint(tiny_loaded, eval_folder):
    """`tiny_loaded`, saved."""
    folder = eval_folder / "saved"
    tiny_loaded.model.save_pretrained(folder)
    tiny_loaded.processor.save_pretrained(folder)
    return folder
