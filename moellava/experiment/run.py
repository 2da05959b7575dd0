"""Trains, evaluates and compares what an experiment names: `run_experiment`, `plan_experiment`.

In the experiment's folder each variant and seed has a folder with its stages' runs and its
`evaluation`; `results.json`, `results.md` and `results.png` tell of all of them. Every part is left
alone if it is there, so that the same call after a kill ends with the same files.
"""

import json
import logging
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

from accelerate.utils import get_int_from_env
from accelerate.utils.memory import clear_device_cache

from moellava.eval.run import evaluate
from moellava.experiment.card import write_card
from moellava.experiment.check import Checked, check_runs, describe
from moellava.experiment.options import EvaluationOptions, Experiment
from moellava.experiment.picture import save_picture
from moellava.experiment.results import Json, summarize_runs
from moellava.experiment.runs import Run, plan_runs
from moellava.experiment.table import results_table
from moellava.storage.errors import reading
from moellava.storage.locking import locked
from moellava.storage.writing import replacing, write_json, write_text
from moellava.train import train

logger = logging.getLogger(__name__)

RESULTS_FILE, TABLE_FILE, PICTURE_FILE = "results.json", "results.md", "results.png"
SETTINGS_FILE = "evaluation.json"  # beside scores.json, of what made them


def plan_experiment(experiment: Experiment) -> str:
    """What an experiment would do, after the same checks; nothing is trained or written.

    Raises: as `run_experiment` before its first step.
    """
    runs = plan_runs(experiment)
    return describe(experiment, runs, check_runs(experiment, runs))


def run_experiment(
    experiment: Experiment,
    *,
    show_progress: bool = False,
    say: Callable[[str], None] = logger.info,
) -> Json:
    """Train and evaluate every variant with every seed, and compare them.

    Args:
        say: is told, in a line each, what is done next.

    Returns:
        The content of `results.json`.

    Raises:
        OSError: data or a model cannot be read, or the folder is in use.
        ValueError: a setting, a row or a question that does not fit; before anything is trained.
        FloatingPointError: a loss or gradient that is not finite.
    """
    if get_int_from_env(("WORLD_SIZE",), 1) > 1:
        raise ValueError(
            "An experiment runs in one process. Train its stages by moellava train if they need "
            "several devices, and evaluate their models by moellava eval."
        )
    runs = plan_runs(experiment)
    checked = check_runs(experiment, runs, show_progress=show_progress)
    root = Path(str(experiment.output_dir)).expanduser()
    root.mkdir(parents=True, exist_ok=True)
    with locked(root):
        for run in runs:
            _train_and_evaluate(experiment, run, show_progress, say)
        return _write_results(experiment, runs, checked, root)


def _train_and_evaluate(
    experiment: Experiment, run: Run, show_progress: bool, say: Callable[[str], None]
) -> None:
    where = f"seed {run.seed}, {run.variant}"
    for number, stage in enumerate(run.stages, 1):
        say(f"{where}: stage {stage.name} ({number} of {len(run.stages)})")
        train(stage.recipe, show_progress=show_progress)
        clear_device_cache(garbage_collection=True)  # the next model needs the room
    options, folder = experiment.evaluation, run.evaluation_folder
    if _is_evaluated(folder, options):
        return
    say(f"{where}: evaluation")
    evaluate(
        run.model_folder,
        options.data,
        folder,
        options.settings(progress=show_progress),
        split=options.split,
        images=options.images,
        language=options.language,
        train=options.train,
    )
    write_json(folder / SETTINGS_FILE, _plain(options))  # last: the evaluation is whole


def _is_evaluated(folder: Path, options: EvaluationOptions) -> bool:
    """Whether an earlier call has evaluated the model, in the same way."""
    file = folder / SETTINGS_FILE
    if not file.is_file():
        return False
    with reading(file, "the settings of an evaluation"):
        earlier: object = json.loads(file.read_text(encoding="utf-8"))
    return earlier == _plain(options)


def _plain(options: EvaluationOptions) -> object:
    """What an evaluation depends on, as JSON has it."""
    settings = {name: value for name, value in asdict(options).items() if name != "metrics"}
    plain: object = json.loads(json.dumps(settings))
    return plain


def _write_results(experiment: Experiment, runs: list[Run], checked: Checked, root: Path) -> Json:
    results = summarize_runs(experiment, runs, checked)
    for run in runs:
        write_card(run, experiment)
    with replacing(root / PICTURE_FILE) as part:
        save_picture(results, part)
    write_text(root / TABLE_FILE, results_table(results))
    write_json(root / RESULTS_FILE, results)  # last: the experiment is whole
    return results
