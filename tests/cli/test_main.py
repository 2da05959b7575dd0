"""What every command does with an error, an interrupt and a reader that goes away."""

import subprocess
import sys

import pytest
import typer
from typer.testing import CliRunner, Result

from moellava.cli import app


def run_with(error: BaseException) -> Result:
    """A command that raises `error`, in a group like moellava's."""
    group = typer.Typer(cls=app.info.cls)
    group.callback()(lambda: None)

    @group.command()
    def fail() -> None:
        raise error

    return CliRunner().invoke(group, ["fail"])


@pytest.mark.parametrize(
    "error",
    [
        ValueError("the width is 3;\nexpected 4"),
        OSError("the width is 3; expected 4"),
        ImportError("the width is 3; expected 4"),
        TypeError("the width is 3; expected 4"),
        FloatingPointError("the width is 3; expected 4"),
    ],
)
def test_an_error_is_one_line_and_exit_status_1(error):
    result = run_with(error)
    assert result.exit_code == 1
    assert result.stderr == "moellava: error: the width is 3; expected 4\n"


def test_an_unexpected_error_says_what_it_is_and_how_to_see_where():
    result = run_with(KeyError("layers"))
    assert result.exit_code == 1
    assert result.stderr.startswith("moellava: error: KeyError: 'layers' (moellava --verbose")
    assert result.stderr.count("\n") == 1


def test_an_interrupt_is_exit_status_130_without_a_message():
    result = run_with(KeyboardInterrupt())
    assert (result.exit_code, result.stderr) == (130, "")


@pytest.mark.parametrize("arguments", [["ask"], ["train"], ["nonsense"], ["ask", "a", "b"]])
def test_a_mistake_of_usage_is_exit_status_2(arguments):
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 2
    assert "Usage" in result.stderr


def test_a_reader_that_goes_away_leaves_no_traceback():
    code = "import sys; from moellava.cli import main; sys.argv[1:] = ['train', '--list']; main()"
    process = subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    process.stdout.close()
    assert process.wait() == 141
    assert process.stderr.read() == b""


def test_the_version_is_the_package_s():
    import moellava

    result = CliRunner().invoke(app, ["--version"])
    assert result.stdout == f"moellava {moellava.__version__}\n"
