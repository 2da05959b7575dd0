"""Open answers judged by another model, if asked for: `judge_answers`, by an OpenAI-style server.

Only text is sent: question, truth and answer. Each verdict is kept in a file as it comes, so that
nothing is asked twice.
"""

import hashlib
import json
import os
import time
import urllib.error
import urllib.request
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

from moellava.eval.predictions import Prediction

PROMPT = (
    "Question about a medical image: {question}\nTrue answer: {truth}\nAnswer to judge: {answer}\n"
    "Does the answer to judge say the same as the true answer? Reply with one word, yes or no."
)


@dataclass(frozen=True, kw_only=True)
class Judge:
    """The model that judges.

    Args:
        url: of the server, up to and with `/v1`.
        model: as the server names it.
        prompt: with `{question}`, `{truth}` and `{answer}`.
        key_variable: the environment variable with the server's key; none is sent if it is not set.
        num_tries: for each answer; between them the wait doubles from `wait` seconds.
    """

    url: str
    model: str
    prompt: str = PROMPT
    key_variable: str = "MOELLAVA_JUDGE_KEY"
    num_tries: int = 5
    wait: float = 1.0
    timeout: float = 60.0


@dataclass(frozen=True)
class Verdict:
    """What the judge said of one answer; `is_right` is None if it said neither yes nor no."""

    id: str
    is_right: bool | None
    said: str


def judge_answers(predictions: Iterable[Prediction], judge: Judge, path: Path) -> Iterator[Verdict]:
    """The judge's verdict on every open answer, at temperature 0.

    Args:
        path: a file of JSON lines that keeps the verdicts; those of the same judge, prompt and text
            are taken from it.

    Raises:
        ConnectionError: the server did not answer; what it said and what to do is named.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    known = _known(path)
    for prediction in predictions:
        if prediction.answer_type != "open":
            continue
        text = judge.prompt.format(
            question=prediction.question, truth=prediction.truth, answer=prediction.answer
        )
        key = hashlib.sha256(f"{judge.url}\0{judge.model}\0{text}".encode()).hexdigest()
        if key not in known:
            known[key] = _ask(judge, text)
            with path.open("a", encoding="utf-8") as file:
                file.write(json.dumps({"key": key, "said": known[key]}, ensure_ascii=False) + "\n")
        yield Verdict(prediction.id, _read(known[key]), known[key])


def describe(judge: Judge) -> dict[str, object]:
    """The judge as results name it."""
    told = asdict(judge)
    return {name: told[name] for name in ("url", "model", "prompt")} | {"temperature": 0}


def _known(path: Path) -> dict[str, str]:
    """Verdicts of earlier runs; half a line, of a run that was killed, is cut off."""
    if not path.exists():
        return {}
    content = path.read_bytes()
    whole = content[: content.rfind(b"\n") + 1]
    if len(whole) < len(content):
        path.write_bytes(whole)
    lines = (json.loads(line) for line in whole.decode("utf-8").split("\n") if line)
    return {line["key"]: line["said"] for line in lines}


def _read(said: str) -> bool | None:
    word = said.strip().lower().strip(".!*\"'")
    return {"yes": True, "no": False}.get(word)


def _ask(judge: Judge, text: str) -> str:
    body = {
        "model": judge.model,
        "temperature": 0,
        "max_tokens": 8,
        "messages": [{"role": "user", "content": text}],
    }
    headers = {"Content-Type": "application/json"}
    if os.environ.get(judge.key_variable):
        headers["Authorization"] = f"Bearer {os.environ[judge.key_variable]}"
    request = urllib.request.Request(
        f"{judge.url.rstrip('/')}/chat/completions", json.dumps(body).encode(), headers
    )
    for attempt in range(judge.num_tries):
        found = _send(judge, request, is_last=attempt == judge.num_tries - 1)
        if found is not None:
            return found
        time.sleep(judge.wait * 2**attempt)
    raise ValueError(f"num_tries is {judge.num_tries}; expected 1 or more.")


def _send(judge: Judge, request: urllib.request.Request, is_last: bool) -> str | None:
    """What the server says, or None if it is worth another try."""
    try:
        with urllib.request.urlopen(request, timeout=judge.timeout) as response:
            return str(json.load(response)["choices"][0]["message"]["content"])
    except (urllib.error.URLError, TimeoutError, ValueError, KeyError, IndexError) as error:
        is_refused = isinstance(error, urllib.error.HTTPError) and error.code in (400, 401, 404)
        if is_refused or is_last:
            raise ConnectionError(
                f"The judge {judge.model} at {judge.url} did not answer: {error}. Verdicts so far "
                "are kept; run it again when the server answers."
            ) from error
        return None
