"""The one call with an empty cache and a hub that answers: a server on this machine that speaks the
hub's HTTP.
"""

import hashlib
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread

import pytest

from moellava.testing import BIOMEDCLIP, REVISION, TINYLLAMA

ANSWER = f"""
from moellava.model.builder_enhanced import load_pretrained_model
loaded = load_pretrained_model(
    {{
        "model_name_or_path": "{TINYLLAMA}",
        "mm_vision_tower": "{BIOMEDCLIP}",
        "mm_hidden_size": 768,
    }}
)
from PIL import Image
print(loaded.answer(Image.new("RGB", (300, 200)), "What is shown?", max_new_tokens=2))
print(loaded.model.config.vision_config.tower, loaded.model.config.vision_config.revision)
"""


class Hub(ThreadingHTTPServer):
    """Serves the snapshots of a Hugging Face cache under their repo ids, and remembers what was
    asked for.
    """

    def __init__(self, snapshots: dict[str, Path]) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.snapshots = snapshots
        self.asked: list[str] = []


class _Handler(BaseHTTPRequestHandler):
    server: Hub

    def do_HEAD(self) -> None:
        self._respond(with_body=False)

    def do_GET(self) -> None:
        self._respond(with_body=True)

    def _respond(self, *, with_body: bool) -> None:
        self.server.asked.append(f"{self.command} {self.path}")
        match = re.fullmatch(r"/(?P<repo>[^/]+/[^/]+)/resolve/[^/]+/(?P<file>[^?]+)", self.path)
        if match is None:  # the API: listings of folders are empty, and nothing else is known
            body = b"[]" if "/tree/" in self.path else b"{}"
            headers, status = {"Content-Type": "application/json"}, 200
        elif (file := self.server.snapshots[match["repo"]] / match["file"]).is_file():
            body = file.read_bytes()
            headers = {"ETag": hashlib.sha256(body).hexdigest(), "X-Repo-Commit": REVISION}
            status = 200
        else:
            body, headers, status = (
                b"",
                {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": REVISION},
                404,
            )
        self.send_response(status)
        for name, value in (headers | {"Content-Length": str(len(body))}).items():
            self.send_header(name, value)
        self.end_headers()
        if with_body:
            self.wfile.write(body)

    def log_message(self, *args: object) -> None:
        pass


@pytest.fixture
def hub(hub_cache) -> Iterator[Hub]:
    with Hub(hub_cache) as server:
        Thread(target=server.serve_forever, daemon=True).start()
        yield server
        server.shutdown()


def run(hub: Hub, cache: Path, *words: str, offline: bool = False) -> str:
    environment = os.environ | {
        "HF_ENDPOINT": f"http://127.0.0.1:{hub.server_port}",
        "HF_HUB_CACHE": str(cache),
        "HF_HUB_OFFLINE": str(int(offline)),
        "HF_HUB_DISABLE_XET": "1",
        "NO_PROXY": "127.0.0.1",
    }
    done = subprocess.run([sys.executable, *words], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def test_show_names_the_files_of_a_repo_that_is_not_here_and_fetches_no_weights(hub, tmp_path):
    text = run(hub, tmp_path, "-m", "moellava.cli", "encoders", "show", BIOMEDCLIP)
    assert "open_clip_pytorch_model.bin  not on this machine" in text
    assert f"hf download {BIOMEDCLIP} " in text
    assert not any(line.startswith("GET") and "model.bin" in line for line in hub.asked)


def test_the_one_call_fetches_what_it_needs_and_then_works_without_the_hub(hub, tmp_path):
    online = run(hub, tmp_path, "-c", ANSWER)
    assert f"{BIOMEDCLIP} {REVISION}" in online
    fetched = {
        line.partition("/resolve/")[2].partition("/")[2]
        for line in hub.asked
        if line.startswith("GET")
    }
    assert {"open_clip_config.json", "open_clip_pytorch_model.bin", "model.safetensors"} <= fetched
    assert not any(
        "BiomedBERT" in line or "BiomedNLP" in line for line in hub.asked
    )  # no text tower
    assert {path.name for path in tmp_path.iterdir() if path.name.startswith("models--")} == {
        f"models--{repo.replace('/', '--')}" for repo in (BIOMEDCLIP, TINYLLAMA)
    }
    asked = len(hub.asked)
    assert run(hub, tmp_path, "-c", ANSWER, offline=True) == online
    assert len(hub.asked) == asked
