"""The command `moellava`."""

import logging
from typing import Any

import typer
from typer.core import TyperGroup

from moellava.cli import data, encoders
from moellava.cli import eval as evaluation
from moellava.cli.ask import ask
from moellava.cli.demo import demo
from moellava.cli.train import train
from moellava.cli.verify import verify


class _Commands(TyperGroup):
    """A mistake of the user's is one line on stderr and exit status 1, not a traceback."""

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except (OSError, ValueError, ImportError, FloatingPointError) as error:
            typer.echo(f"moellava: error: {error}", err=True)
            raise typer.Exit(1) from error


app = typer.Typer(
    name="moellava",
    cls=_Commands,
    help="Medical vision-language models: an image encoder joined to a mixture-of-experts language model.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
app.command(short_help="Train a toy on real images and question it (two minutes).")(demo)
app.command(short_help="Answer questions about images with a saved model.")(ask)
app.command(short_help="Train one stage by a recipe.")(train)
app.command(short_help="Check that a tower and a language model are here and work.")(verify)
app.command()(encoders.encode)
app.command()(encoders.classify)
app.add_typer(encoders.app, name="encoders")
app.add_typer(data.app, name="data")
app.add_typer(evaluation.app, name="eval")


def _print_version(wanted: bool) -> None:
    if wanted:
        from moellava import __version__

        typer.echo(f"moellava {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: bool = typer.Option(
        False,
        "--version",
        help="Print the version and exit.",
        callback=_print_version,
        is_eager=True,
    ),
    verbose: bool = typer.Option(
        False, "--verbose", "-v", help="Say what is loaded, in log lines."
    ),
) -> None:
    logging.basicConfig(
        level=logging.INFO if verbose else logging.WARNING,
        format="%(levelname)s %(name)s: %(message)s",
    )


def main() -> None:
    """The entry point of the shell command."""
    app()
