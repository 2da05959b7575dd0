"""The script for a GPU runs at toy size on a CPU, so that it works when a card is at hand."""

import json
from pathlib import Path

import pytest

from tests.gpu import measure
from tests.gpu.measure import SECTIONS, TINY, Machine, Row


@pytest.mark.slow
def test_every_section_runs_at_toy_size(tmp_path, capsys):
    out = tmp_path / "out.json"
    measure.main(["--device", "cpu", "--tiny", "--json", str(out)])
    found = json.loads(out.read_text())
    names = {row["section"] for row in found["rows"]}
    assert names == {section.__name__ for section in SECTIONS} - {"skipped_tests"}
    assert all(row["value"] > 0 for row in found["rows"])
    assert "| bounds |" in capsys.readouterr().out
    assert (Path(measure.__file__).parent / "run").read_text().endswith('tests.gpu.measure "$@"\n')


def test_a_section_that_fails_is_named_and_the_others_run(monkeypatch):
    import torch

    def broken(machine):
        yield Row("broken", "first", 1.0, "s")
        raise ValueError("no such kernel")

    def sound(machine):
        yield Row("sound", "second", 2.0, "s")

    monkeypatch.setattr(measure, "SECTIONS", (broken, sound))
    machine = Machine(torch.device("cpu"), TINY, True)
    assert measure.run(machine) == ["broken: ValueError: no such kernel"]
    assert [row.section for row in machine.rows] == ["broken", "sound"]
