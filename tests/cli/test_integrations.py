"""`moellava integrations` prints files that are Python and name what they register."""

import ast

import pytest
from typer.testing import CliRunner

from moellava.cli import app
from moellava.integrations import NAMES, integration_file


@pytest.mark.parametrize("name", NAMES)
def test_the_file_is_printed_or_its_place(name):
    printed = CliRunner().invoke(app, ["integrations", name]).stdout
    assert printed == integration_file(name).read_text(encoding="utf-8")
    ast.parse(printed)
    assert 'NAME = "moellava"' in printed
    place = CliRunner().invoke(app, ["integrations", name, "--path"]).stdout
    assert place == f"{integration_file(name)}\n"


def test_all_are_listed():
    listed = CliRunner().invoke(app, ["integrations"]).stdout.splitlines()
    assert [line.split()[0] for line in listed] == list(NAMES)


def test_an_unknown_one_names_the_nearest():
    result = CliRunner().invoke(app, ["integrations", "ms_swift"])
    assert result.exit_code == 1
    assert "Did you mean 'ms-swift'" in result.stderr
