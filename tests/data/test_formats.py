"""A layout of one's own, and what each built-in one says of its columns and archives."""

import json

import pytest

from moellava import plugins
from moellava.data import FORMATS, Format, Row, RowError, Turn, read_rows, register_format
from moellava.data.formats import find_format
from moellava.testing.datasets import picture


@pytest.fixture(autouse=True)
def registry(monkeypatch):
    monkeypatch.setattr("moellava.data.formats.FORMATS", FORMATS.copy())


def to_row(record, index, context):
    turns = (Turn("user", "<image>\nWhat is it?"), Turn("assistant", record["finding"]))
    return Row(id=record["case"], images=(str(context.image_root / record["scan"]),), turns=turns)


CASES = Format(
    name="cases",
    to_row=to_row,
    matches=lambda columns, name: "finding" in columns,
    image_keys=("scan",),
    id_keys=("case",),
    image_folders=("scans",),
)


def write(path, rows):
    path.write_text(json.dumps(rows))
    return path


def test_a_layout_of_ones_own_is_registered(tmp_path):
    register_format(CASES)
    (tmp_path / "scans").mkdir()
    picture(0).save(tmp_path / "scans" / "a.png")
    path = write(tmp_path / "c.json", [{"case": "1", "scan": "a.png", "finding": "none"}])
    rows = read_rows(path)
    assert (rows.format, rows[0].answer) == ("cases", "none")
    assert rows[0].images == (str(tmp_path / "scans" / "a.png"),)
    with pytest.raises(RowError, match=r"row 0 \(id '1'\): it has no 'scan'"):
        read_rows(write(tmp_path / "d.json", [{"case": "1", "finding": "none"}]))


def test_a_name_is_taken_once():
    register_format(CASES)
    register_format(CASES)
    assert find_format("cases", (), "x") is CASES
    with pytest.raises(ValueError, match="'cases' is taken"):
        register_format(Format(name="cases", to_row=lambda record, index, context: None))


def test_an_entry_point_registers_a_format(tmp_path, monkeypatch):
    from types import SimpleNamespace

    entry = SimpleNamespace(load=lambda: lambda: register_format(CASES))
    monkeypatch.setattr(plugins, "entry_points", lambda group: [entry] * (group == GROUP))
    plugins.load_plugins.cache_clear()
    try:
        assert find_format("cases", (), "x.json") is CASES
    finally:
        plugins.load_plugins.cache_clear()


GROUP = "moellava.formats"


@pytest.mark.parametrize("form", FORMATS, ids=lambda form: form.name)
def test_every_format_names_its_images_and_is_found_by_its_name(form):
    assert form.image_keys
    assert form.id_keys
    assert find_format(form.name, (), "x") is form


@pytest.mark.parametrize(
    ("split", "archives"),
    [
        ("train", ("images.zip",)),
        ("test_2", ("images_2.zip",)),
        (None, ("images.zip", "images_2.zip")),
    ],
)
def test_each_version_of_pmc_vqa_has_an_archive_of_its_own(split, archives):
    assert tuple(find_format("pmc_vqa", (), "x").archives(split)) == archives
