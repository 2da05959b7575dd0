"""`moellava explain` and `moellava explain routing`."""

import json

import numpy as np
import pytest
from PIL import Image
from typer.testing import CliRunner

from moellava.cli import app
from moellava.model.builder_enhanced import load_pretrained_model
from moellava.testing import TINYLLAMA, write_biomedclip


@pytest.fixture(scope="module")
def checkpoint(hub_cache, tmp_path_factory):
    folder = tmp_path_factory.mktemp("explain")
    tower = write_biomedclip(folder / "biomedclip_test", vision="test_vit", image_size=160)
    parts = {"model_name_or_path": TINYLLAMA, "mm_vision_tower": str(tower)}
    loaded = load_pretrained_model(parts, dtype="float32")
    loaded.model.save_pretrained(folder / "checkpoint")
    loaded.processor.save_pretrained(folder / "checkpoint")
    return folder / "checkpoint"


@pytest.fixture(scope="module")
def scan(tmp_path_factory):
    path = tmp_path_factory.mktemp("scans") / "scan.png"
    values = np.random.default_rng(0).integers(0, 256, (50, 70, 3), dtype=np.uint8)
    Image.fromarray(values).save(path)
    return path


def run(*words):
    return CliRunner().invoke(app, [str(word) for word in words])


def test_a_question_becomes_a_page(checkpoint, scan, tmp_path, no_network):
    out = tmp_path / "out"
    result = run(
        *("explain", checkpoint, scan, "What is this?", "--out", out),
        *("--max-new-tokens", 3, "--blocks", 2),
    )
    assert result.exit_code == 0, result.output
    written = {path.name for path in out.iterdir()}
    assert written >= {"index.html", "attention.png", "ablation.png", "load.png", "pathways.png"}
    assert result.output.splitlines()[-1] == f"open {out / 'index.html'}"


def test_without_the_ablation_and_with_an_answer(checkpoint, scan, tmp_path):
    words = ("--answer", "a lung", "--no-ablation", "--out", tmp_path)
    result = run("explain", "answer", checkpoint, scan, "What is this?", *words)
    assert result.exit_code == 0, result.output
    assert result.output.splitlines()[0] == "a lung"
    assert not (tmp_path / "ablation.png").exists()


def test_a_missing_image_is_one_line(checkpoint, tmp_path):
    result = run("explain", checkpoint, "scna.png", "What is this?", "--out", tmp_path)
    assert result.exit_code == 1
    assert "The image scna.png does not exist." in result.output


@pytest.fixture
def rows(tmp_path):
    rng = np.random.default_rng(0)
    records = []
    for number in range(6):
        values = rng.integers(0, 256, (20, 20, 3), dtype=np.uint8)
        Image.fromarray(values).save(tmp_path / f"{number}.png")
        records.append(
            {
                "id": str(number),
                "image": f"{number}.png",
                "modality": ("CT", "MR")[number % 2],
                "conversations": [
                    {"from": "human", "value": "<image>\nWhat is this?"},
                    {"from": "gpt", "value": "a lung"},
                ],
            }
        )
    path = tmp_path / "rows.json"
    path.write_text(json.dumps(records))
    return path


def test_routing_of_a_data_set(checkpoint, rows, tmp_path):
    out = tmp_path / "routing"
    result = run(
        *("explain", "routing", checkpoint, rows, "--images", tmp_path),
        *("--group-by", "modality", "--out", out, "--limit", 4),
    )
    assert result.exit_code == 0, result.output
    assert "4 rows: CT 2, MR 2" in result.output
    assert "does not show" in result.output
    numbers = json.loads((out / "routing.json").read_text())
    assert numbers["num_images"] == {"CT": 2, "MR": 2}
    assert len(numbers["mutual_information_bits"]["image"]) == len(numbers["layers"])
    assert {path.name for path in out.glob("*.png")} == {"routing.png", "coactivation.png"}


def test_an_unknown_group_is_said_at_once(rows, tmp_path):
    words = ("--images", tmp_path, "--group-by", "modalty", "--out", tmp_path)
    result = run("explain", "routing", "no/such-model", rows, *words)
    assert result.exit_code == 1
    assert "Did you mean 'modality'" in result.output


def test_help_starts_without_torch():
    import subprocess
    import sys

    code = (
        "import sys; from typer.testing import CliRunner; from moellava.cli import app;"
        "result = CliRunner().invoke(app, ['explain', '--help']);"
        "assert 'routing' in result.output; print('torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"
