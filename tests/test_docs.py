"""The snippets of the guides run, in order, on stand-ins under the real ids."""

import re
import shutil
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from nibabel.testing import data_path
from pydicom.data import get_testdata_file

from moellava.testing import BIOMEDCLIP, TINYLLAMA
from tests.images.conftest import write_ct
from tests.images.test_slide import write_slide

ROOT = Path(__file__).parent.parent
GUIDES = (
    "add_a_dataset_format.md",
    "biomedclip.md",
    "builder.md",
    "data.md",
    "explain.md",
    "from_llava.md",
    "resolution.md",
    "saving.md",
)


@pytest.mark.slow
@pytest.mark.parametrize("guide", GUIDES)
def test_the_snippets_of_a_guide_run(
    guide, hub_cache, small_biomedclip, dataset_cache, tmp_path, monkeypatch
):
    from huggingface_hub import HfApi
    from PIL import Image
    from skimage import data

    Image.fromarray(data.immunohistochemistry()).save(tmp_path / "scan.png")
    (tmp_path / "models").mkdir()
    # Of many views, none of which needs the real width.
    tower = small_biomedclip if guide == "resolution.md" else hub_cache[BIOMEDCLIP]
    (tmp_path / "models" / "biomedclip").symlink_to(tower)
    write_mm_projector(tmp_path / "checkpoints" / "llava-pretrain")
    if guide == "explain.md":
        write_checkpoint(tmp_path / "moellava-demo" / "checkpoint", small_biomedclip)
    if guide == "resolution.md":
        write_volumes(tmp_path)
    snippets = re.findall(
        r"^```python\n(.*?)^```", (ROOT / "docs" / guide).read_text(), re.MULTILINE | re.DOTALL
    )
    assert len(snippets) > 1
    monkeypatch.chdir(tmp_path)
    # A hub that takes uploads and keeps nothing.
    monkeypatch.setattr(
        HfApi, "create_repo", lambda self, repo_id, **options: SimpleNamespace(repo_id=repo_id)
    )
    monkeypatch.setattr(HfApi, "file_exists", lambda self, *args, **options: False)
    monkeypatch.setattr(HfApi, "upload_folder", lambda self, **options: "https://hub/commit/1")
    exec(compile("\n".join(snippets), guide, "exec"), {"__name__": guide})


def write_mm_projector(folder):
    """LLaVA's `mm_projector.bin` between the stand-ins of CLIP and Vicuna, both of width 64."""
    layers = torch.nn.Sequential(torch.nn.Linear(64, 64), torch.nn.GELU(), torch.nn.Linear(64, 64))
    folder.mkdir(parents=True)
    state = {f"model.mm_projector.{name}": value for name, value in layers.state_dict().items()}
    torch.save(state, folder / "mm_projector.bin")


def write_volumes(folder):
    """A CT series, an MR volume, a clip of ultrasound and a slide."""
    volume = np.random.default_rng(0).integers(0, 3000, (12, 40, 40)).astype(np.int16)
    write_ct(folder / "ct", volume)
    shutil.copy(Path(data_path) / "anatomical.nii", folder / "mr.nii")
    shutil.copy(get_testdata_file("examples_ybr_color.dcm", download=False), folder / "cine.dcm")
    write_slide(folder / "slide.tif")
    from PIL import Image

    Image.linear_gradient("L").resize((600, 400)).save(folder / "radiograph.png")


def write_checkpoint(folder, tower):
    """A whole model as `moellava demo` leaves it, with random weights."""
    from moellava import load_pretrained_model

    parts = {"model_name_or_path": TINYLLAMA, "mm_vision_tower": str(tower)}
    loaded = load_pretrained_model(parts, dtype="float32")
    loaded.model.save_pretrained(folder)
    loaded.processor.save_pretrained(folder)


@pytest.mark.parametrize("path", sorted((ROOT / "docs").glob("*.png")), ids=lambda path: path.name)
def test_every_picture_is_small_and_shown(path):
    pages = [page.read_text() for page in (ROOT / "docs").glob("*.md")]
    assert path.stat().st_size < 200_000
    shown = (f"]({path.name})", f'src="{path.name}"')
    assert any(one in page for page in pages for one in shown)


@pytest.mark.parametrize("page", sorted(path.name for path in (ROOT / "docs").glob("*.md")))
def test_every_link_of_a_page_has_its_file(page):
    for target in re.findall(r"\]\((?!https?:)([^)#]+)\)", (ROOT / "docs" / page).read_text()):
        assert (ROOT / "docs" / target).exists(), target
