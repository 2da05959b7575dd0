"""`moellava serve` in a process of its own: it answers, its memory stays flat, and it ends."""

import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
from huggingface_hub.utils import httpx

from .test_server import data_uri, post, question

NUM_REQUESTS = 60
MOST = 20 * 2**20  # bytes; pixel values alone, kept for each request, would be 36 MB


def resident(pid: int) -> int:
    """Bytes of memory that a process has."""
    return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="reads Linux's /proc")
def test_memory_stays_flat_over_many_requests(checkpoint, scan):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "moellava.cli", "serve", checkpoint, "--port", str(port)]
    url = data_uri(Path(scan).read_bytes())
    body = {"messages": [question("What is this?", url)], "max_tokens": 2}
    with subprocess.Popen([*command, "--device", "cpu", "--name", "toy"]) as process:
        address = f"http://127.0.0.1:{port}"
        try:
            for _ in range(600):
                try:
                    httpx.get(f"{address}/health").raise_for_status()
                    break
                except httpx.TransportError:
                    assert process.poll() is None
                    time.sleep(0.1)
            for _ in range(20):
                assert post(address, **body).status_code == 200
            before = resident(process.pid)
            for _ in range(NUM_REQUESTS):
                assert post(address, **body).status_code == 200
            assert resident(process.pid) - before < MOST
        finally:
            process.send_signal(signal.SIGINT)
            process.wait(30)
    assert process.returncode in (0, 130)
