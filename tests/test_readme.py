"""Every command and snippet of the README runs: here, or word for word in .ci/run."""

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", README, flags=re.MULTILINE | re.DOTALL)


@pytest.fixture
def demo_folder(hub_cache, small_biomedclip, tmp_path) -> Path:
    """A folder that looks as after `moellava demo`, with a scan in it."""
    from PIL import Image
    from skimage import data

    from moellava import load_pretrained_model
    from moellava.testing import TINYLLAMA

    loaded = load_pretrained_model(
        {"model_name_or_path": TINYLLAMA, "mm_vision_tower": str(small_biomedclip)}
    )
    loaded.model.save_pretrained(tmp_path / "moellava-demo" / "checkpoint")
    loaded.processor.save_pretrained(tmp_path / "moellava-demo" / "checkpoint")
    scan = Image.fromarray(data.immunohistochemistry())
    scan.save(tmp_path / "scan.png")
    scan.save(tmp_path / "moellava-demo" / "held_out.png")
    return tmp_path


@pytest.mark.parametrize("number", range(len(blocks("python"))))
def test_a_python_snippet_runs(number, demo_folder):
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    subprocess.run(
        [sys.executable, "-c", blocks("python")[number]],
        check=True,
        cwd=demo_folder,
        env=environment,
    )


def test_every_command_runs_here_or_in_ci(demo_folder):
    ci_script = [line.strip() for line in (ROOT / ".ci" / "run").read_text().splitlines()]
    commands = [line for block in blocks("bash") for line in block.splitlines()]
    assert len(commands) == 3
    for command in commands:
        if command.startswith("moellava ask"):
            arguments = [sys.executable, "-m", "moellava.cli", *shlex.split(command)[1:]]
            environment = os.environ | {"PYTHONPATH": str(ROOT)}
            output = subprocess.run(
                arguments, check=True, cwd=demo_folder, env=environment, capture_output=True
            )
            assert output.stdout.strip()
        else:
            assert command in ci_script


def test_every_link_to_a_file_of_the_project_has_its_file():
    for target in re.findall(r"\]\((?!https?:)([^)#]+)\)", README):
        assert (ROOT / target).exists(), target
