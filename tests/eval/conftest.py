"""A tiny model and rows with several questions per image, for the tests that ask one."""

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from moellava import load_pretrained_model
from moellava.data import read_rows
from moellava.eval.results import write_results
from tests.eval.samples import EVIL, prediction
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


@pytest.fixture
def report(tmp_path):
    rows = [
        prediction(0, "yes"), prediction(1, f"no {EVIL}", is_cut=True), prediction(2, "yes or no"),
        prediction(3, "lung", f"lung {EVIL}", "open"), prediction(4, "yes", "no"),
    ]  # fmt: skip
    path = tmp_path / "p.jsonl"
    path.write_text("".join(f"{row.as_line()}\n" for row in rows), encoding="utf-8")
    write_results(
        tmp_path, rows, num_resamples=20, baselines={"blank": path}, leaked=[rows[0].id],
        facts={"checkpoint": EVIL, "data": EVIL},
        load_image=lambda name: Image.new("RGB", (300, 200), (200, 0, 0)),
    )  # fmt: skip
    return (tmp_path / "report.html").read_text(encoding="utf-8")
