"""The end of a stage that trains a model: it is written, with its log and picture: `finish`."""

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, cast

from moellava.model.builder_enhanced import load_pretrained_model
from moellava.train.adapters import merge_adapters
from moellava.train.arguments import read_whole
from moellava.train.checkpoints import clear_staging, publish, staging_folder, writing
from moellava.train.log.history import write_history
from moellava.train.log.moved import Moved, movement, num_learning
from moellava.train.log.picture import save_picture
from moellava.train.options import Recipe
from moellava.train.prepare import build_model
from moellava.train.run_folder import ADAPTER_FOLDER, MODEL_FOLDER, PICTURE_FILE, write_log
from moellava.train.stage import LogEntry
from moellava.train.stage_trainer import StageTrainer
from moellava.train.start import find_start

if TYPE_CHECKING:
    from peft import PeftModel


def finish(recipe: Recipe, trainer: StageTrainer, run: Path) -> None:
    """Write the model, last and in one step: a folder `model` means that the stage has finished."""
    assert trainer.model is not None
    learning = num_learning(trainer.model)
    with writing(run, MODEL_FOLDER) as folder:
        if recipe.lora is None:
            trainer.save_model(str(folder))
        else:
            _save_merged(recipe, trainer, staging_folder(run) / ADAPTER_FOLDER, folder)
        trainer.accelerator.wait_for_everyone()
        if trainer.accelerator.is_main_process:
            trainer.loaded.processor.save_pretrained(folder)
            moved = _movement(recipe, trainer, folder, learning)
            _complete(recipe, trainer, run, folder, moved)
    if trainer.accelerator.is_main_process:
        clear_staging(run)
    trainer.accelerator.wait_for_everyone()


def _complete(
    recipe: Recipe, trainer: StageTrainer, run: Path, folder: Path, moved: list[Moved]
) -> None:
    """What stands beside the weights, and the move of the folder to its place."""
    log: list[LogEntry] = trainer.state.log_history
    log.append({"step": trainer.state.global_step, "moved": moved})
    numbers = {
        "steps": trainer.state.global_step,
        "rows": trainer.num_rows,
        "seed": recipe.seed,
    }
    write_history(folder, find_start(recipe), stage=recipe.stage, **numbers)
    write_log(log, run)
    save_picture(log, run / PICTURE_FILE, title=f"stage {recipe.stage}")
    if recipe.lora is not None:
        publish(staging_folder(run) / ADAPTER_FOLDER, run / ADAPTER_FOLDER)
    publish(folder, run / MODEL_FOLDER)


def _movement(
    recipe: Recipe, trainer: StageTrainer, folder: Path, learning: Mapping[str, int]
) -> list[Moved]:
    """How far each part is from where the stage began, which is built again to be compared.

    Args:
        folder: the written model, read where no process has the whole of it.
        learning: of `num_learning`, before adapters were merged.
    """
    trained = trainer.loaded.model
    with read_whole(trainer.args):
        start = build_model(recipe).model
        if trainer.is_sharded or trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled:
            trained = load_pretrained_model(folder).model
    after = dict(trained.named_parameters())
    return movement(start.named_parameters(), after, learning)


def _save_merged(recipe: Recipe, trainer: StageTrainer, adapter: Path, folder: Path) -> None:
    """The adapters as PEFT saves them, and the ordinary model that they make of the start."""
    trainer.save_model(str(adapter))
    if not trainer.accelerator.is_main_process:
        return
    if trainer.is_sharded:  # no process has the whole model, so it is built again
        merged = merge_adapters(build_model(recipe).model, adapter)
    else:
        adapted = cast("PeftModel", trainer.model)
        merged = adapted.merge_and_unload()
    merged.save_pretrained(folder)
