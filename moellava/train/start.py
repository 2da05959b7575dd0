"""What a stage starts from: `find_start`."""

from pathlib import Path

from moellava.messages import unknown_name
from moellava.train.checkpoints import checkpoints
from moellava.train.log.history import HISTORY_FILE, read_history
from moellava.train.options import Recipe
from moellava.train.run_folder import MODEL_FOLDER
from moellava.train.stage import STAGES, stage_of

ANY = "any"  # `after: any` takes every model


def find_start(recipe: Recipe) -> str | None:
    """The folder or id of the model to start from; None if the recipe names parts.

    Raises:
        OSError: if the folder is missing, or its run has not finished.
        ValueError: if it is not of the stage that has to come before.
    """
    after = recipe.after or stage_of(recipe).after
    if after is not None and after not in (ANY, *STAGES):
        raise unknown_name("stage in after:", after, [ANY, *STAGES])
    needs = None if after in (None, ANY) else after
    if recipe.start_from is None:
        _require_parts(recipe, needs)
        return None
    if recipe.model:
        raise ValueError(
            f"start_from is {recipe.start_from!r}, a model whose parts are fixed, but the recipe "
            f"has model={dict(recipe.model)} too. Leave out one of them (model={{}})."
        )
    folder = Path(recipe.start_from).expanduser()
    if not folder.is_dir():
        if needs is None:
            return recipe.start_from  # an id of the hub
        raise FileNotFoundError(
            f"start_from is {recipe.start_from!r}, which is not a folder. Stage {recipe.stage!r} "
            f"starts from the output_dir of a finished {needs!r} stage; after=any takes any saved "
            "model or hub id."
        )
    model_folder = _finished_model(recipe.start_from, folder)
    if needs is not None:
        _require_stage(recipe, needs, model_folder)
    return str(model_folder)


def _require_parts(recipe: Recipe, needs: str | None) -> None:
    if needs is not None:
        raise ValueError(
            f"Stage {recipe.stage!r} starts from a finished {needs!r} stage: set start_from to its "
            f"output_dir. (That stage: moellava train {STAGES[needs].recipe})"
        )
    if not recipe.model:
        raise ValueError(
            "The recipe names no model: set model.model_name_or_path and model.mm_vision_tower."
        )


def _finished_model(start_from: str, folder: Path) -> Path:
    model_folder = folder / MODEL_FOLDER if (folder / MODEL_FOLDER).is_dir() else folder
    if (model_folder / "config.json").is_file():
        return model_folder
    unfinished = ", ".join(path.name for path in checkpoints(folder))
    found = (
        f"only {unfinished}: that run has not finished; start it again, and it resumes"
        if unfinished
        else "none"
    )
    raise FileNotFoundError(
        f"start_from is {start_from!r}, but there is no finished model in it ({found})."
    )


def _require_stage(recipe: Recipe, needs: str, model_folder: Path) -> None:
    history = read_history(model_folder)
    last = history[-1]["stage"] if history else None
    if last == needs:
        return
    made = (
        f"made by stage {last!r}"
        if last
        else f"not a model of `moellava train` (it has no {HISTORY_FILE})"
    )
    raise ValueError(
        f"Stage {recipe.stage!r} starts from a model of stage {needs!r}, but {recipe.start_from!r} "
        f"is {made}. What is missing: moellava train {STAGES[needs].recipe} "
        f"start_from={recipe.start_from} output_dir=... "
        f"To start from it all the same: after={last or ANY}."
    )
