"""vLLM's HTTP server with one of the tiny models: streams, 32 at once, and too many images.

python tests/vllm/server.py OUT    OUT is written by checkpoints.py
"""

import argparse
import asyncio
import json
import socket
import subprocess
import sys
import time
from pathlib import Path

import aiohttp

KIND = "medmoe-biomedclip-mlp"
AT_ONCE = 32
LONGEST_START = 240  # seconds


async def ask(session: aiohttp.ClientSession, url: str, body: dict[str, object]) -> list[int]:
    """The tokens of one answer, put together from its stream."""
    tokens: list[int] = []
    async with session.post(
        url, json={**body, "stream": True, "return_token_ids": True}
    ) as response:
        response.raise_for_status()
        async for line in response.content:
            data = line.decode().removeprefix("data:").strip()
            if data and data != "[DONE]":
                tokens += json.loads(data)["choices"][0].get("token_ids") or []
    return tokens


async def check(url: str, questions: dict[str, object], expected: list[list[int]]) -> None:
    """Raise `SystemExit` unless all streams give `generate`'s tokens, and a limit is an error."""
    common = {"model": "tiny", "temperature": 0, "max_tokens": questions["new_tokens"]}
    chats = questions["chats"]
    async with aiohttp.ClientSession() as session:
        start = time.perf_counter()
        answers = await asyncio.gather(
            *(ask(session, url, {**common, "messages": chat}) for chat in chats[:AT_ONCE])
        )
        seconds = time.perf_counter() - start
        too_many = [
            item for chat in chats for item in chat[0]["content"] if item["type"] == "image_url"
        ][: questions["most_images"] + 1]
        body = {**common, "messages": [{"role": "user", "content": too_many}]}
        async with session.post(url, json=body) as response:
            status, message = response.status, (await response.json())["error"]["message"]
    equal = sum(tokens == wanted for tokens, wanted in zip(answers, expected, strict=False))
    print(f"RESULT | {KIND} | {AT_ONCE} streams at once | {equal}/{AT_ONCE} | {seconds:.0f} s")
    print(f"RESULT | one image too many | status {status} | {message}")
    if equal != AT_ONCE or status != 400:
        raise SystemExit("The server's answers differ from those of generate.")


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("out", type=Path)
    out = parser.parse_args().out
    questions = json.loads((out / "questions.json").read_text())
    answers = json.loads((out / "answers" / f"{KIND}.json").read_text())
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    limits = json.dumps({"image": questions["most_images"]})
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server"]
    command += ["--model", str(out / KIND), "--served-model-name", "tiny", "--dtype", "float32"]
    command += ["--host", "127.0.0.1", "--port", str(port), "--enforce-eager"]
    command += ["--max-model-len", "1024", "--limit-mm-per-prompt", limits]
    server = subprocess.Popen(command)
    try:
        wait_for(port, server)
        url = f"http://127.0.0.1:{port}/v1/chat/completions"
        asyncio.run(check(url, questions, [answer["tokens"] for answer in answers]))
    finally:
        server.terminate()
        server.wait(60)


def wait_for(port: int, server: subprocess.Popen[bytes]) -> None:
    """Return once the port is listened on."""
    for _ in range(LONGEST_START):
        if server.poll() is not None:
            raise SystemExit(f"vLLM's server ended with status {server.returncode}.")
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)) == 0:
                return
        time.sleep(1)
    raise SystemExit(f"vLLM's server does not answer after {LONGEST_START} s.")


if __name__ == "__main__":
    main()
