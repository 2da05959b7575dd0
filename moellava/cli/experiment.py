"""`moellava experiment`: a file becomes trained variants, their evaluation and one table."""

import sys
from pathlib import Path
from typing import Annotated

import typer


def experiment(
    file: Annotated[str, typer.Argument(metavar="FILE", help="A YAML file; see docs.")],
    settings: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="KEY=VALUE", help="Settings over the file's, such as evaluation.limit=100."
        ),
    ] = None,
    dry_run: Annotated[
        bool,
        typer.Option(
            "--dry-run", help="Look at all data and models, and print what would be trained."
        ),
    ] = False,
) -> None:
    """Train variants over several seeds, evaluate them with baselines, and compare them.

    Type it again after an interruption: what is finished is left alone, what was begun resumes.
    """
    from moellava.experiment import load_experiment, plan_experiment, run_experiment

    chosen = load_experiment(file, settings or ())
    if dry_run:
        typer.echo(plan_experiment(chosen))
        return
    from moellava.experiment.run import PICTURE_FILE, RESULTS_FILE, TABLE_FILE
    from moellava.experiment.table import results_table

    results = run_experiment(chosen, show_progress=sys.stderr.isatty(), say=typer.echo)
    typer.echo(results_table(results))
    typer.echo(f"{Path(str(chosen.output_dir))}: {RESULTS_FILE}, {TABLE_FILE}, {PICTURE_FILE}")
