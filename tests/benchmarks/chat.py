"""What the server and the page add to `generate`, and what batching waiting requests saves.

    python -m tests.benchmarks.chat [--rounds 7] [--dtype bfloat16]

ViT-B/16 and a mixture of SmolLM2-135M's shapes (30 layers, every second one of 4 experts), random
weights. The client is in the same process and asks over a socket. 500 MB of disk.
"""

import argparse
import base64
import io
import json
import os
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from statistics import median
from typing import Any

import torch
from huggingface_hub.utils import httpx
from PIL import Image
from skimage import data

from moellava.chat.server import create_app
from moellava.chat.web.app import create_web_app
from moellava.model.builder_enhanced import LoadedModel, load_pretrained_model
from moellava.testing import write_biomedclip, write_smollm2
from tests.benchmarks.encoders import alternate, row
from tests.chat.serving import app_running

NEW_TOKENS = 16
NUM_WAITING = 16


def real_width_model(folder: Path, dtype: str) -> LoadedModel:
    tower = write_biomedclip(folder / "biomedclip")
    text = write_smollm2(
        folder / "smollm2", hidden_size=576, intermediate_size=1536, num_hidden_layers=30
    )
    parts = {"model_name_or_path": str(text), "mm_vision_tower": str(tower)}
    loaded = load_pretrained_model(parts, dtype=dtype)
    write_only_words(loaded)
    return loaded


def png(number: int = 0) -> bytes:
    file = io.BytesIO()
    Image.fromarray(data.immunohistochemistry()[number : number + 256, :256]).save(file, "PNG")
    return file.getvalue()


def body(question: str, image: bytes, **options: object) -> dict[str, Any]:
    url = {"url": f"data:image/png;base64,{base64.b64encode(image).decode()}"}
    items = [{"type": "image_url", "image_url": url}, {"type": "text", "text": question}]
    messages = [{"role": "user", "content": items}]
    return {"model": "toy", "messages": messages, "max_tokens": NEW_TOKENS, **options}


def write_only_words(loaded: LoadedModel) -> None:
    """Suppress all tokens that are not whole words, so that each token is text at once."""
    words = {id for text, id in loaded.tokenizer.get_vocab().items() if text.strip("Ġ").isalpha()}
    vocabulary = range(loaded.model.config.text_config.vocab_size)
    loaded.model.generation_config.suppress_tokens = [id for id in vocabulary if id not in words]


def bench_first_token(loaded: LoadedModel, folder: Path, rounds: int) -> None:
    """From a PNG and a question to the first piece of text."""
    question, image = "What is shown?", png()

    def generate() -> None:
        loaded.answer(Image.open(io.BytesIO(image)), question, max_new_tokens=1)

    with (
        app_running(create_app(loaded, name="toy"), "error") as address,
        httpx.Client(timeout=60) as http,
    ):
        url = f"{address}/v1/chat/completions"

        def served() -> float:
            request = body(question, image, stream=True, max_tokens=2)
            start = time.perf_counter()
            with http.stream("POST", url, json=request) as response:
                times = [time.perf_counter() for line in response.iter_lines() if text_of(line)]
            return times[0] - start

        print_first("server", generate, served, rounds)
    app = create_web_app(loaded, folder / "page", name="toy")
    with app_running(app, "error") as address, httpx.Client(base_url=address, timeout=60) as http:
        print_first("page", generate, lambda: page_asked(http, question, image), rounds)


def print_first(
    what: str, generate: Callable[[], None], ours: Callable[[], float], rounds: int
) -> None:
    """The seconds that `ours` tells beside those of `generate`, taking turns."""
    told: list[float] = []
    calls = {"ours": lambda: told.append(ours()), "generate": generate}
    theirs = alternate(calls, rounds)["generate"]
    told = told[1:]
    row(f"first token, {what}", "s", told, theirs, median(told) / median(theirs), "<= 1.05")


def text_of(line: str) -> str:
    if not line.startswith("data: {"):
        return ""
    choices = json.loads(line[6:])["choices"]
    return choices[0]["delta"].get("content", "") if choices else ""


def page_asked(http: httpx.Client, question: str, image: bytes) -> float:
    """Seconds until a new page, to which the image was uploaded before, shows the first text."""
    session = os.urandom(4).hex()
    config = http.get("/config").json()
    (path,) = http.post("/gradio_api/upload", files={"files": ("a.png", image)}).json()
    file = {"path": path, "meta": {"_type": "gradio.FileData"}}
    list(events(http, session, function(config, "moellava-files"), [file]))
    number = function(config, "moellava-question")
    start, told, num_steps = time.perf_counter(), 0.0, 0  # the first step shows the question
    for event in events(http, session, number, question, 0, 2, 0):
        num_steps += event["msg"] == "process_generating"
        told = told or (time.perf_counter() if num_steps == 2 else 0.0)
    return told - start


def events(http: httpx.Client, session: str, number: int, *values: object) -> Iterator[Any]:
    request = {"data": values, "fn_index": number, "session_hash": session}
    http.post("/gradio_api/queue/join", json=request).raise_for_status()
    with http.stream("GET", "/gradio_api/queue/data", params={"session_hash": session}) as stream:
        for line in stream.iter_lines():
            if line.startswith("data: "):
                event = json.loads(line[6:])
                yield event
                if event["msg"] == "process_completed":
                    assert event["success"], event
                    return


def function(config: Any, name: str) -> int:
    ids = {item["id"] for item in config["components"] if item["props"].get("elem_id") == name}
    found = (
        item for item in config["dependencies"] if {place[0] for place in item["targets"]} & ids
    )
    return int(next(found)["id"])


def bench_waiting(loaded: LoadedModel, rounds: int) -> None:
    """16 requests of one image each, at once and one after the other."""
    requests = [body(f"Question {n}?", png(n)) for n in range(NUM_WAITING)]
    limits = httpx.Limits(max_connections=None)
    with (
        app_running(create_app(loaded, name="toy"), "error") as address,
        httpx.Client(limits=limits, timeout=600) as http,
        ThreadPoolExecutor(NUM_WAITING) as pool,
    ):

        def answered(request: object) -> None:
            http.post(f"{address}/v1/chat/completions", json=request).raise_for_status()

        calls = {
            "at once": lambda: list(pool.map(answered, requests)),
            "one by one": lambda: [answered(request) for request in requests],
        }
        found = alternate(calls, rounds)
    ours, theirs = found["at once"], found["one by one"]
    row(f"{NUM_WAITING} waiting", "s", ours, theirs, median(ours) / median(theirs), "<= 0.5")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--dtype", default="bfloat16")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        loaded = real_width_model(Path(name), options.dtype)
        print(f"{loaded}, torch {torch.__version__}, {torch.get_num_threads()} threads")
        print("| what | unit | ours | theirs | ratio | asked |\n|---|---|---|---|---|---|")
        bench_first_token(loaded, Path(name), options.rounds)
        bench_waiting(loaded, max(2, options.rounds // 3))


if __name__ == "__main__":
    main()
