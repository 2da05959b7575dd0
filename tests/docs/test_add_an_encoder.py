"""The worked example of docs/add_an_encoder.md: its two files are written, and its test passes."""

import re
import subprocess
import sys
from pathlib import Path

GUIDE = Path(__file__).parents[2] / "docs" / "add_an_encoder.md"


def test_the_encoder_of_the_guide_passes_the_test_of_the_guide(tmp_path):
    blocks = re.findall(r"^```python\n# (\w+\.py)\n(.*?)^```", GUIDE.read_text(), re.M | re.S)
    assert [name for name, _ in blocks] == ["patchnet.py", "test_patchnet.py"]
    for name, text in blocks:
        (tmp_path / name).write_text(text)
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "test_patchnet.py"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "2 passed" in done.stdout
