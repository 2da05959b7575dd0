"""The snippets of docs/chat.md run, in order; the server that they ask is a real one."""

import re
import shutil
from pathlib import Path

import pytest
from pydicom.data import get_testdata_file

from .test_server import running

GUIDE = Path(__file__).parents[2] / "docs" / "chat.md"


@pytest.mark.slow
def test_the_snippets_run(checkpoint, loaded, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "moellava-demo").mkdir()
    (tmp_path / "moellava-demo" / "checkpoint").symlink_to(checkpoint)
    for name in ("scan.dcm", "other.dcm"):
        shutil.copy(get_testdata_file("CT_small.dcm", download=False), name)
    snippets = re.findall(r"^```python\n(.*?)^```", GUIDE.read_text(), re.MULTILINE | re.DOTALL)
    assert len(snippets) == 3
    with running(loaded, name="demo") as address:
        code = "\n".join(snippets).replace("http://127.0.0.1:8000", address)
        exec(compile(code, GUIDE.name, "exec"), {"__name__": "guide"})
