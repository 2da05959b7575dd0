"""A recipe → a trained model in a folder, with its log and picture: `train`."""

import logging

from moellava.train.options import Recipe
from moellava.train.run_folder import MODEL_FOLDER, read_log, require_same_recipe, run_folder
from moellava.train.stage import TrainResult, stage_of

logger = logging.getLogger(__name__)


def train(recipe: Recipe, *, show_progress: bool = True) -> TrainResult:
    """Run one stage.

    The run's folder, `recipe.output_dir`, receives `recipe.yaml`, `checkpoint-N` folders,
    TensorBoard's `runs`, `log.json`, `training.png` and, at the end, `model`: what
    `load_pretrained_model` opens and the next stage starts from. Called again after a kill, it
    resumes from the newest checkpoint and ends with the same weights.

    Raises:
        OSError: if data, model or folder cannot be read or written.
        ValueError: if the recipe, a row, or the folder's earlier recipe does not fit.
        FloatingPointError: at the first loss or gradient that is not finite.
    """
    run = run_folder(recipe)
    require_same_recipe(recipe, run)
    if (run / MODEL_FOLDER).is_dir():
        logger.info("%s has finished before", run)
        return TrainResult(run / MODEL_FOLDER, read_log(run), was_finished=True)
    return stage_of(recipe).run(recipe, run, show_progress)
