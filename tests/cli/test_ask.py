import json
import sys

import numpy as np
import pytest
from typer.testing import CliRunner

from moellava.cli import app, main
from moellava.model.builder_enhanced import LoadedModel, load_pretrained_model
from moellava.testing import TINYLLAMA
from tests.images.conftest import write_ct


@pytest.fixture(scope="module")
def checkpoint(hub_cache, small_biomedclip, tmp_path_factory) -> str:
    folder = tmp_path_factory.mktemp("ask") / "checkpoint"
    loaded = load_pretrained_model(
        {"model_name_or_path": TINYLLAMA, "mm_vision_tower": str(small_biomedclip)}
    )
    loaded.model.save_pretrained(folder)
    loaded.processor.save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def scans(tmp_path_factory) -> list[str]:
    """One real image as PNG, JPEG and TIFF."""
    from PIL import Image
    from skimage import data

    folder = tmp_path_factory.mktemp("scans")
    paths = [str(folder / f"scan.{suffix}") for suffix in ("png", "jpg", "tiff")]
    for path in paths:
        Image.fromarray(data.immunohistochemistry()[:200, :300]).save(path)
    return paths


def ask(*arguments: str):
    return CliRunner().invoke(app, ["ask", *arguments, "--device", "cpu", "--max-new-tokens", "4"])


def test_one_answer_is_printed_alone(checkpoint, scans):
    result = ask(checkpoint, scans[0], "What modality is this?")
    expected = load_pretrained_model(checkpoint).answer(
        scans[0], "What modality is this?", max_new_tokens=4
    )
    assert (result.exit_code, result.stdout) == (0, f"{expected[0]}\n")


def test_every_question_is_asked_about_each_image(checkpoint, scans):
    result = ask(checkpoint, *scans, "What modality is this?", "Why?")
    rows = [line.split("\t") for line in result.stdout.splitlines()]
    assert [row[:2] for row in rows] == [
        [scan, q] for scan in scans for q in ("What modality is this?", "Why?")
    ]


def test_each_answer_stands_beside_its_question(checkpoint, scans, monkeypatch):
    monkeypatch.setattr(
        LoadedModel, "answer", lambda self, image, questions, **_: [q.upper() for q in questions]
    )
    result = ask(checkpoint, *scans[:2], "a why?", "b why?")
    assert result.stdout.splitlines() == [
        f"{scan}\t{q}\t{q.upper()}" for scan in scans[:2] for q in ("a why?", "b why?")
    ]


def test_json_holds_image_question_and_answer(checkpoint, scans):
    result = ask(checkpoint, scans[0], "--question", "Ki-67/CD3?", "--json")
    (row,) = json.loads(result.stdout)
    assert (row["image"], row["question"]) == (scans[0], "Ki-67/CD3?")
    assert isinstance(row["answer"], str)


def test_dicom_is_asked_through_the_window_given(checkpoint):
    from pydicom.data import get_testdata_file

    from moellava.images import to_pil

    scan = str(get_testdata_file("CT_small.dcm", download=False))
    result = ask(checkpoint, scan, "What is this?", "--window", "-600,1500")
    picture = to_pil(scan, window=(-600, 1500))
    expected = load_pretrained_model(checkpoint).answer(picture, "What is this?", max_new_tokens=4)
    assert (result.exit_code, result.stdout) == (0, f"{expected[0]}\n")


class TestErrors:
    """What a shell user sees: one line on stderr, no traceback; status 2 for a wrong command line,
    else 1.
    """

    def run(self, capsys, monkeypatch, *arguments: str) -> tuple[int, str]:
        monkeypatch.setattr(sys, "argv", ["moellava", "ask", *arguments])
        with pytest.raises(SystemExit) as stop:
            main()
        return int(stop.value.code), capsys.readouterr().err

    def test_a_missing_image(self, capsys, monkeypatch, checkpoint):
        status, error = self.run(capsys, monkeypatch, checkpoint, "none.png", "Why?")
        assert status == 1
        assert error.startswith("moellava: error: The image none.png does not exist.")

    def test_an_unreadable_image(self, capsys, monkeypatch, checkpoint, tmp_path):
        (tmp_path / "x.png").write_bytes(b"no image")
        status, error = self.run(capsys, monkeypatch, checkpoint, str(tmp_path / "x.png"), "Why?")
        assert status == 1
        assert "x.png cannot be read as an image" in error

    def test_no_question(self, capsys, monkeypatch, checkpoint, scans):
        status, error = self.run(capsys, monkeypatch, checkpoint, scans[0])
        assert status == 2
        assert "no question among" in error

    def test_no_image(self, capsys, monkeypatch, checkpoint):
        status, error = self.run(capsys, monkeypatch, checkpoint, "What is this?")
        assert status == 2
        assert "no image among" in error

    def test_a_folder_that_is_no_checkpoint(self, capsys, monkeypatch, scans, tmp_path):
        status, error = self.run(capsys, monkeypatch, str(tmp_path), scans[0], "Why?")
        assert status == 1
        assert "is not a checkpoint: it has no config.json" in error


def test_version_and_help():
    from moellava import __version__

    assert CliRunner().invoke(app, ["--version"]).stdout == f"moellava {__version__}\n"
    help_text = CliRunner().invoke(app, ["--help"]).stdout
    assert all(command in help_text for command in ("ask", "demo"))


def test_a_series_is_seen_as_slices(checkpoint, tmp_path):
    volume = np.random.default_rng(0).integers(0, 3000, (12, 9, 11)).astype(np.int16)
    write_ct(tmp_path / "ct", volume)
    options = ("--slices", "2,3,-1", "--channels", "lung,mediastinum,bone")
    result = ask(checkpoint, str(tmp_path / "ct"), "Why?", *options)
    slices, channels = {"num": 2, "first": 3, "last": -1}, ("lung", "mediastinum", "bone")
    expected = load_pretrained_model(checkpoint).answer(
        tmp_path / "ct", "Why?", slices=slices, channels=channels, max_new_tokens=4
    )
    assert (result.exit_code, result.stdout) == (0, f"{expected[0]}\n")
    without = ask(checkpoint, str(tmp_path / "ct"), "Why?")
    assert "is not a regular file" in without.stderr
    assert "slices=" in without.stderr
