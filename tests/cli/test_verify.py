import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import torch
from safetensors.torch import load_file
from typer.testing import CliRunner

from moellava.cli import app
from moellava.testing import TINYLLAMA

ROOT = Path(__file__).parent.parent.parent


def verify(*arguments: str):
    return CliRunner().invoke(app, ["verify", *arguments])


def test_a_folder_tower_and_a_cached_language_model_pass(hub_cache, small_biomedclip, no_network):
    result = verify("--tower", str(small_biomedclip))
    assert result.exit_code == 0, result.output
    assert "196 patch tokens of width 192, real" in result.stdout
    assert f"{small_biomedclip / 'open_clip_config.json'} (folder)" in result.stdout
    assert "cache of the hub, 0123456" in result.stdout
    assert "FAIL" not in result.stdout


def test_a_missing_language_model_says_what_to_fetch_and_ends_with_status_1(
    hub_cache, small_biomedclip
):
    result = verify(
        "--tower", str(small_biomedclip), "--language-model", "nobody/no-llama", "--json"
    )
    steps = json.loads(result.stdout)
    assert result.exit_code == 1
    assert [step["passed"] for step in steps] == [True, True, False]
    assert "hf download nobody/no-llama" in steps[-1]["detail"]


def test_a_language_model_of_pickled_weights_passes(
    hub_cache, small_biomedclip, tmp_path, no_network
):
    folder = shutil.copytree(hub_cache[TINYLLAMA], tmp_path / "llama")
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    result = verify("--tower", str(small_biomedclip), "--language-model", str(folder))
    assert result.exit_code == 0, result.output
    assert f"{folder / 'pytorch_model.bin'} (folder)" in result.stdout


def test_damaged_weights_fail_the_encoder_step(hub_cache, small_biomedclip, tmp_path):
    folder = shutil.copytree(small_biomedclip, tmp_path / "biomedclip_damaged")
    weights = torch.load(folder / "open_clip_pytorch_model.bin", weights_only=True)
    weights["visual.trunk.pos_embed"][:] = float("nan")
    torch.save(weights, folder / "open_clip_pytorch_model.bin")
    result = verify("--tower", str(folder))
    assert result.exit_code == 1
    assert "gives NaN or infinity: its weights are damaged" in result.stdout


def test_the_guides_script_runs_alone(hub_cache, small_biomedclip):
    script = ROOT / "tests" / "integration" / "test_biomedclip_encoder.py"
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    result = subprocess.run(
        [sys.executable, str(script), str(small_biomedclip)],
        env=environment,
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stdout + result.stderr
    assert "pass  encoder alone: 196 patch tokens of width 192, real, 14x14 grid" in result.stdout
