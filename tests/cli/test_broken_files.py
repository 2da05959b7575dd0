"""Whatever a command is given, it says one line and exits with 1: no traceback, no other error."""

from pathlib import Path

import pytest
from PIL import Image
from typer.testing import CliRunner

from moellava.cli import app

CONTENTS = {
    "web page": b"<!DOCTYPE html><html>404</html>",
    "utf-16": '{"model_type": "moellava"}'.encode("utf-16"),
    "list": b"[1]",
    "deep": b'{"a":' * 3000 + b"1" + b"}" * 3000,
}
MODEL, ROWS, IMAGE = "model", "rows.json", "image.png"
COMMANDS = {
    "ask": [MODEL, IMAGE, "What is this?"],
    "chat": [MODEL],
    "serve": [MODEL, "--port", "18081"],
    "train": ["recipe.yaml"],
    "encode": [".", "--encoder", MODEL, "--out", "out.safetensors"],
    "classify": [IMAGE, "--labels", "a,b", "--encoder", MODEL],
    "encoders show": [MODEL],
    "data check": [ROWS],
    "data convert": [ROWS, "out.json"],
    "explain answer": [MODEL, IMAGE, "What?", "--out", "out"],
    "explain routing": [MODEL, ROWS, "--group-by", "id", "--out", "out"],
    "eval run": [MODEL, ROWS, "--out", "out"],
    "eval score": ["predictions.jsonl"],
    "eval compare": ["predictions.jsonl", "predictions.jsonl"],
}


@pytest.fixture
def folder(tmp_path, monkeypatch) -> Path:
    (tmp_path / MODEL).mkdir()
    Image.new("RGB", (8, 8)).save(tmp_path / IMAGE)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize("content", CONTENTS)
@pytest.mark.parametrize("command", COMMANDS)
def test_a_broken_file_is_one_line_and_exit_status_1(folder, command, content):
    for name in (f"{MODEL}/config.json", ROWS, "recipe.yaml", "predictions.jsonl"):
        (folder / name).write_bytes(CONTENTS[content])
    result = CliRunner().invoke(app, [*command.split(), *COMMANDS[command]])
    assert result.exit_code == 1, result.output
    (line,) = result.stderr.splitlines()
    assert line.startswith("moellava: error: ")
    assert "--verbose" not in line, line  # what the line of an unexpected kind says
    assert "Traceback" not in result.output
