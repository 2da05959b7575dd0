"""`moellava verify`: the first command on a new machine."""

import json
from dataclasses import asdict
from typing import Annotated

import typer


def verify(
    tower: Annotated[str | None, typer.Option(help="Image encoder; default: BiomedCLIP.")] = None,
    language_model: Annotated[
        str | None, typer.Option(help="Language model; default: TinyLlama chat.")
    ] = None,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print a JSON list of the steps.")
    ] = False,
) -> None:
    """Check a machine: versions, files, the encoder alone, then the whole model on one image.

    Each step prints its time, the peak memory so far, and what was seen or what to do. Exit status
    1 if a step failed.
    """
    from moellava import verify as checks

    steps = checks.verify(
        tower or checks.DEFAULT_TOWER, language_model or checks.DEFAULT_LANGUAGE_MODEL
    )
    done = []
    for check in steps:
        done.append(check)
        if not as_json:
            state = "pass" if check.passed else "FAIL"
            cost = f"{check.seconds:.1f} s, peak {check.peak_mebibytes:,.0f} MiB"
            typer.echo(f"{state}  {check.name}  ({cost})")
            typer.echo("      " + check.detail.strip().replace("\n", "\n      "))
    if as_json:
        typer.echo(json.dumps([asdict(check) for check in done], indent=1))
    if not all(check.passed for check in done):
        raise typer.Exit(1)
