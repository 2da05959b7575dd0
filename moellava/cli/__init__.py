"""The command `moellava`."""

import logging
import os
import sys
from typing import Any

import typer
from typer.core import TyperGroup

from moellava.cli import data, encoders, explain, export
from moellava.cli import eval as evaluation
from moellava.cli.ask import ask
from moellava.cli.chat import chat
from moellava.cli.demo import demo
from moellava.cli.experiment import experiment
from moellava.cli.integrations import integrations
from moellava.cli.serve import serve
from moellava.cli.train import train
from moellava.cli.verify import verify
from moellava.cli.web import web

logger = logging.getLogger(__name__)


class _Commands(TyperGroup):
    """An error is one line on stderr and exit status 1, not a traceback; `--verbose` shows both."""

    def invoke(self, ctx: Any) -> Any:  # typer's own Context differs between its releases
        """Run a command; 130 if it was interrupted, 141 if its reader has gone away."""
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt:
            raise typer.Exit(130) from None
        except BrokenPipeError:
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # nothing left to flush
            raise typer.Exit(141) from None
        except (typer.Exit, typer.Abort):
            raise
        except Exception as error:
            if hasattr(error, "exit_code"):  # a mistake of usage, which typer prints
                raise
            logger.info("where it happened:", exc_info=True)
            typer.echo(f"moellava: error: {_one_line(error)}", err=True)
            raise typer.Exit(1) from error


def _one_line(error: Exception) -> str:
    text = " ".join(str(error).split())
    if isinstance(error, OSError | ValueError | ImportError | TypeError | FloatingPointError):
        return text
    # Not one of ours: say what it is, and how to see where it came from.
    return f"{type(error).__name__}: {text} (moellava --verbose ... shows where)"


app = typer.Typer(
    name="moellava",
    cls=_Commands,
    help=(
        "Medical vision-language models: an image encoder joined to a mixture-of-experts "
        "language model."
    ),
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
app.command(short_help="Train a toy on real images and question it (two minutes).")(demo)
app.command(short_help="Answer questions about images with a saved model.")(ask)
app.command(short_help="Talk with a saved model about images.")(chat)
app.command(short_help="Talk with a saved model in the browser.")(web)
app.command(short_help="Answer OpenAI's chat completions over HTTP.")(serve)
app.command(short_help="Train one stage by a recipe.")(train)
app.command(short_help="Train variants over seeds, evaluate and compare them.")(experiment)
app.command(short_help="Print what registers our models with ms-swift or LLaMA-Factory.")(
    integrations
)
app.command(short_help="Check that a tower and a language model are here and work.")(verify)
app.command()(encoders.encode)
app.command()(encoders.classify)
app.add_typer(encoders.app, name="encoders")
app.add_typer(data.app, name="data")
app.add_typer(explain.app, name="explain")
app.add_typer(export.app, name="export")
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
    # torchao, which transformers imports if it is there, makes torch warn at every command.
    logging.getLogger("torch.utils._pytree").setLevel(logging.ERROR)


def main() -> None:
    """The entry point of the shell command."""
    app()
