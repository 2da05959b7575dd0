"""`moellava integrations`: the files that register our models with other trainers."""

from typing import Annotated

import typer


def integrations(
    name: Annotated[
        str | None, typer.Argument(help="ms-swift or llama-factory; without it, all are listed.")
    ] = None,
    path: Annotated[
        bool, typer.Option("--path", help="Print where the file is in place of its text.")
    ] = False,
) -> None:
    """Print the file that registers moellava's models with another trainer."""
    from moellava.integrations import NAMES, integration_file

    if name is None:
        for known in NAMES:
            typer.echo(f"{known:<14} {integration_file(known)}")
        return
    file = integration_file(name)
    typer.echo(file if path else file.read_text(encoding="utf-8"), nl=path)
