import json
import sys

import pytest
from PIL import Image
from typer.testing import CliRunner

from moellava.cli import app, main
from moellava.testing import write_slake
from moellava.testing.datasets import picture


def run(*arguments: str):
    return CliRunner().invoke(app, ["data", *map(str, arguments)])


@pytest.fixture
def folder(tmp_path):
    rows = []
    for number in range(4):
        picture(number).save(tmp_path / f"{number}.png")
        turns = [
            {"from": "human", "value": f"<image>\nWhat is {number}?"},
            {"from": "gpt", "value": "It is " * number + "so."},
        ]
        rows.append(
            {
                "id": f"r{number}",
                "image": f"{number}.png",
                "conversations": turns,
                "answer_type": "OPEN",
            }
        )
    (tmp_path / "train.json").write_text(json.dumps(rows[:3]))
    (tmp_path / "test.json").write_text(json.dumps(rows[3:]))
    return tmp_path


def test_a_sound_file_passes_with_summary_and_histogram(folder):
    result = run(
        "check", folder / "train.json", "--images", folder, "--against", folder / "test.json"
    )
    assert result.exit_code == 0
    assert "read as llava: 3 rows, 3 images" in result.stdout
    assert "answer type  OPEN 3" in result.stdout
    assert "length of a row in words" in result.stdout
    assert result.stdout.rstrip().endswith("nothing wrong")


def test_problems_are_listed_and_make_the_status_one(folder):
    (folder / "1.png").unlink()
    result = run(
        "check", folder / "train.json", "--images", folder, "--against", folder / "train.json"
    )
    assert result.exit_code == 1
    assert "ERROR   missing image: 2" in result.stdout
    assert "ERROR   leak: same id: 3" in result.stdout
    assert "ERROR   leak: same image: 2" in result.stdout
    assert "row 1 (id 'r1')" in result.stdout


def test_report_and_picture_are_written(folder, tmp_path, hub_cache):
    from moellava.testing import TINYLLAMA

    out = tmp_path / "report"
    result = run(
        "check",
        folder / "train.json",
        "--images",
        folder,
        "--tokenizer",
        TINYLLAMA,
        "--out",
        out,
        "--json",
    )
    printed = json.loads(result.stdout)
    assert printed == json.loads((out / "report.json").read_text())
    assert printed["rows"] == 3
    assert printed["lengths"]["unit"] == "tokens"
    assert printed["lengths"]["shortest"] < printed["lengths"]["longest"]
    assert Image.open(out / "lengths.png").size[0] > 500


def test_convert_to_llava_and_back(tmp_path):
    slake = write_slake(tmp_path / "slake")
    result = run("convert", slake, tmp_path / "en.json", "--split", "train", "--language", "en")
    assert (result.exit_code, result.stdout) == (0, f"{tmp_path / 'en.json'}: 3 rows\n")
    assert len(json.loads((tmp_path / "en.json").read_text())) == 3


def test_skip_bad_lists_what_was_left_out(folder):
    rows = json.loads((folder / "train.json").read_text())
    rows[1]["conversations"][1]["value"] = ""
    (folder / "train.json").write_text(json.dumps(rows))
    result = run("convert", folder / "train.json", folder / "out.jsonl", "--skip-bad")
    assert result.exit_code == 0
    assert "2 rows" in result.stdout
    assert "left out: row 1 (id 'r1'): empty turn: turn 1 (assistant) is empty" in result.stdout


def test_without_skip_bad_the_row_is_named_on_one_line(folder, capsys, monkeypatch):
    rows = json.loads((folder / "train.json").read_text())
    rows[1]["conversations"] = None
    (folder / "train.json").write_text(json.dumps(rows))
    monkeypatch.setattr(
        sys,
        "argv",
        ["moellava", "data", "convert", str(folder / "train.json"), str(folder / "o.json")],
    )
    with pytest.raises(SystemExit) as stop:
        main()
    assert stop.value.code == 1
    error = capsys.readouterr().err
    assert error.startswith("moellava: error: ")
    assert "train.json, row 1 (id 'r1'): 'conversations' is missing" in error
    assert not (folder / "o.json").exists()
