"""open_clip repos of every architecture in `architectures.py`, written once per test session."""

from pathlib import Path

import open_clip
import pytest
import torch
from filelock import FileLock

from tests.conftest import HUB
from tests.encoders.architectures import ARCHITECTURES, write_open_clip


def repo_of(name: str) -> Path:
    folder = HUB / "local" / f"open_clip_{name}"
    with FileLock(f"{folder}.lock"):
        if not (folder / "open_clip_config.json").exists():
            write_open_clip(folder, ARCHITECTURES[name])
    return folder


@pytest.fixture(autouse=True)
def no_gradients(request):
    """Inference, as the oracles: torch's attention differs when gradients are recorded."""
    with torch.set_grad_enabled("gradient" in request.node.name):
        yield


@pytest.fixture(params=sorted(ARCHITECTURES))
def repo(request) -> Path:
    """A folder with an open_clip checkpoint; the test runs once per architecture."""
    (HUB / "local").mkdir(exist_ok=True)
    return repo_of(request.param)


@pytest.fixture
def architecture():
    """A function: the repo of one architecture by name."""
    (HUB / "local").mkdir(exist_ok=True)
    return repo_of


def open_clip_model(repo: Path, **options) -> torch.nn.Module:
    """open_clip's own model of a repo, the oracle."""
    return open_clip.create_model(f"local-dir:{repo}", require_pretrained=True, **options).eval()
