"""The snippets of the guides run, in order, on stand-ins under the real ids."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
GUIDES = ("biomedclip.md", "builder.md", "data.md")


@pytest.mark.slow
@pytest.mark.parametrize("guide", GUIDES)
def test_the_snippets_of_a_guide_run(guide, hub_cache, dataset_cache, tmp_path):
    from PIL import Image
    from skimage import data

    Image.fromarray(data.immunohistochemistry()).save(tmp_path / "scan.png")
    snippets = re.findall(r"^```python\n(.*?)^```", (ROOT / "docs" / guide).read_text(), re.MULTILINE | re.DOTALL)
    assert len(snippets) > 1
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    subprocess.run([sys.executable, "-c", "\n".join(snippets)], check=True, cwd=tmp_path, env=environment)


@pytest.mark.parametrize("page", sorted(path.name for path in (ROOT / "docs").glob("*.md")))
def test_every_link_of_a_page_has_its_file(page):
    for target in re.findall(r"\]\((?!https?:)([^)#]+)\)", (ROOT / "docs" / page).read_text()):
        assert (ROOT / "docs" / target).exists(), target
