"""Code that needs a process of its own."""

import subprocess
import sys


def printed(code: str) -> list[str]:
    """The lines that this code prints in a fresh process."""
    command = [sys.executable, "-c", code]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()
