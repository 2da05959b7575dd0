"""The snippets of docs/explain.md run, in order, on stand-ins; its pictures are small."""

import re
from pathlib import Path

import pytest

from moellava.testing import write_biomedclip

DOCS = Path(__file__).parents[2] / "docs"


@pytest.mark.slow
def test_the_snippets_run(loaded, picture, tmp_path, monkeypatch):
    picture.save(tmp_path / "scan.png")
    loaded.model.save_pretrained(tmp_path / "models" / "moellava")
    loaded.processor.save_pretrained(tmp_path / "models" / "moellava")
    write_biomedclip(tmp_path / "models" / "biomedclip", vision="test_vit", image_size=160)
    snippets = re.findall(
        r"^```python\n(.*?)^```", (DOCS / "explain.md").read_text(), re.MULTILINE | re.DOTALL
    )
    assert len(snippets) == 2
    monkeypatch.chdir(tmp_path)
    exec(compile("\n".join(snippets), "explain.md", "exec"), {"__name__": "explain.md"})
    assert (tmp_path / "attention.png").exists()
    assert (tmp_path / "pictures" / "index.html").exists()
    assert (tmp_path / "words.png").exists()


def test_every_picture_of_the_guide_is_small():
    names = re.findall(r"!\[.*?\]\((.*?\.png)\)", (DOCS / "explain.md").read_text())
    assert len(names) >= 4
    for name in names:
        assert (DOCS / name).stat().st_size < 200_000
