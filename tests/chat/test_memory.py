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

from tests.chat.serving import data_uri, question

NUM_REQUESTS = 30
MOST = 9 * 2**20  # bytes; pixel values alone, kept for each request, would be 18 MB


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
    body = {"model": "toy", "messages": [question("What is this?", url)], "max_tokens": 2}
    with (
        subprocess.Popen([*command, "--device", "cpu", "--name", "toy"]) as process,
        httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=60) as http,
    ):

        def ask(times: int) -> None:
            for _ in range(times):
                http.post("/v1/chat/completions", json=body).raise_for_status()

        try:
            for _ in range(600):
                try:
                    http.get("/health").raise_for_status()
                    break
                except httpx.TransportError:
                    assert process.poll() is None
                    time.sleep(0.1)
            ask(10)
            before = resident(process.pid)
            ask(NUM_REQUESTS)
            assert resident(process.pid) - before < MOST
        finally:
            process.send_signal(signal.SIGINT)
            process.wait(30)
    assert process.returncode in (0, 130)
