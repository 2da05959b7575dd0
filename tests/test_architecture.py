"""Imports point downwards without circles, and the package keeps its shape."""

import subprocess
import sys

import pytest

from tests import house


def test_imports_point_downwards_without_circles():
    """The contracts in pyproject.toml; lazy imports and those for type checkers are read, too."""
    command = [
        sys.executable,
        "-c",
        "from importlinter.cli import lint_imports_command as run; run()",
    ]
    result = subprocess.run(
        [*command, "--no-cache"], capture_output=True, text=True, cwd=house.PACKAGE.parent
    )
    assert result.returncode == 0, result.stdout


@pytest.mark.parametrize("name", house.LIMITS)
def test_the_package_keeps_its_shape(name):
    assert house.measure()[name] <= house.LIMITS[name]


def test_a_circle_is_found(tmp_path):
    package = tmp_path / "toy"
    package.mkdir()
    (package / "__init__.py").touch()
    (package / "a.py").write_text("def f():\n    from toy import b\n")
    (package / "b.py").write_text("from toy.c import x\n")
    (package / "c.py").write_text("from toy.a import f\nx = f\n")
    (package / "d.py").write_text("import toy.a\n")
    assert house.modules_in_circles(package) == {"toy.a", "toy.b", "toy.c"}
