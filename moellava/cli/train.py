"""`moellava train`: a recipe becomes a model."""

from pathlib import Path
from typing import Annotated

import typer


def train(
    recipe: Annotated[
        str | None,
        typer.Argument(
            metavar="RECIPE", help="A YAML file, or the name of a packaged recipe (--list)."
        ),
    ] = None,
    settings: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="KEY=VALUE",
            help="Settings over the recipe's, such as optim.learning_rate=1e-4.",
        ),
    ] = None,
    dry_run: Annotated[
        bool,
        typer.Option(
            "--dry-run", help="Print what would be trained, the steps and a memory estimate."
        ),
    ] = False,
    show_list: Annotated[
        bool, typer.Option("--list", help="List the packaged recipes and accelerate configs.")
    ] = False,
) -> None:
    """Train one stage: align the projector, tune the language model, train experts and router.

    A killed run resumes from its newest checkpoint when the same line is typed again.
    """
    if show_list:
        _print_list()
        return
    if recipe is None:
        raise typer.BadParameter(
            "give a recipe: a YAML file, or a name of `moellava train --list`."
        )
    from moellava.train import load_recipe
    from moellava.train import train as run

    chosen = load_recipe(recipe, settings or ())
    if dry_run:
        from moellava.train.plan import plan

        typer.echo(plan(chosen).text)
        return
    result = run(chosen)
    if not _is_main_process():
        return
    if result.was_finished:
        typer.echo(f"This run had finished. Its model: {result.model_folder}")
        return
    for entry in result.log[-1:]:
        if "moved" in entry:
            from moellava.train.log.moved import movement_text

            typer.echo(movement_text(entry["moved"]))
    typer.echo(f"Model: {result.model_folder}")
    if result.log:
        typer.echo(f"Log and picture: {result.model_folder.parent}: log.json, training.png")


def _print_list() -> None:
    from moellava.train.recipe import FOLDER, recipe_names

    typer.echo("recipes")
    for name in recipe_names():
        first = (
            (FOLDER / f"{name}.yaml").read_text(encoding="utf-8").splitlines()[0].removeprefix("# ")
        )
        typer.echo(f"  {name:<20} {first}")
    typer.echo("configs for accelerate launch --config_file")
    for path in sorted((Path(FOLDER).parent / "accelerate").glob("*.yaml")):
        typer.echo(f"  {path}")


def _is_main_process() -> bool:
    import os

    return os.environ.get("RANK", "0") == "0"
