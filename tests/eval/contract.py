"""What other tools may rely on in `predictions.jsonl` and `scores.json`, as checks of the files."""

import json
import re
from collections.abc import Mapping
from pathlib import Path

_METRIC = re.compile(
    r"(open|closed|choice)_(recall|precision|f1|exact|accuracy|bleu[1-4]|rouge[12l]|ambiguous|none)"
    r"|accuracy|f1"
)


def is_text(value: object) -> bool:
    return isinstance(value, str)


def is_texts(value: object) -> bool:
    return isinstance(value, list) and all(map(is_text, value))


def is_count(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


PREDICTION = {
    "id": is_text,
    "images": is_texts,
    "question": is_text,
    "prompt": is_text,
    "answer": is_text,
    "truth": is_text,
    "answer_type": lambda value: value in ("open", "closed", "choice"),
    "answer_type_from": lambda value: is_text(value) and value,
    "options": is_texts,
    "groups": lambda value: isinstance(value, dict) and all(map(is_text, value.values())),
    "num_tokens": lambda value: value is None or is_count(value),
    "seconds": lambda value: value is None or (isinstance(value, float) and value >= 0),
}


def read_and_check(folder: Path) -> tuple[list[dict], dict]:
    """The lines and the scores of a result; an AssertionError names what breaks the contract."""
    text = (folder / "predictions.jsonl").read_text(encoding="utf-8")
    assert text.endswith("\n")
    lines = [json.loads(line) for line in text.split("\n")[:-1]]
    for line in lines:
        for name, is_valid in PREDICTION.items():
            assert name in line, f"{name} is missing in {line}"
            assert is_valid(line[name]), f"{name} is {line[name]!r}"
    assert len({line["id"] for line in lines}) == len(lines)
    scores = json.loads(
        (folder / "scores.json").read_text(encoding="utf-8"), parse_constant=_refuse
    )
    check_scorers(scores)
    for values in scores["groups"].values():
        for one in values.values():
            check_scorers(one)
    return lines, scores


def check_scorers(scores: Mapping) -> None:
    assert scores["scorers"]
    for name, entry in scores["scorers"].items():
        assert entry.keys() == {"version", "metrics"}, name
        assert is_text(entry["version"])
        for metric, found in entry["metrics"].items():
            assert _METRIC.fullmatch(metric), f"{name}: {metric}"
            assert found.keys() == {"value", "low", "high", "n"}
            assert is_count(found["n"])
            assert found["n"] > 0
            assert 0 <= found["low"] <= found["value"] <= found["high"] <= 1, (name, metric, found)


def _refuse(constant: str) -> None:
    raise AssertionError(f"scores.json has {constant}, which is not JSON")
