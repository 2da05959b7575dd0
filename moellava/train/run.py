"""A recipe → a trained model in a folder, with its log and picture; a killed run is gone on with.

Public names: `train`, `TrainResult`, `build_trainer`.
"""

import json
import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml
from transformers import TrainerState, TrainingArguments
from transformers.trainer import TRAINER_STATE_NAME

from moellava.model.loaded_model import LoadedModel
from moellava.train import sharding
from moellava.train.arguments import run_folder, training_arguments
from moellava.train.batches import TrainData, build_collator, read_data, row_lengths
from moellava.train.checkpoints import (
    clear_staging,
    newest_checkpoint,
    publish,
    staging_folder,
    writing,
)
from moellava.train.features import ImageFeatures, encode_rows
from moellava.train.log.history import write_history
from moellava.train.log.picture import save_picture
from moellava.train.recipe import Recipe, recipe_to_dict
from moellava.train.router_fit import fit_router, save_router
from moellava.train.stages import MODEL_FOLDER, build_model, find_start, prepare_model
from moellava.train.trainable import merge_adapters
from moellava.train.trainer import MoeLlavaTrainer

logger = logging.getLogger(__name__)

RECIPE_FILE, LOG_FILE, PICTURE_FILE, ADAPTER_FOLDER = (
    "recipe.yaml",
    "log.json",
    "training.png",
    "adapter",
)
# Keys that may change between a kill and going on: they do not change the weights.
_FREE_KEYS = ("output_dir", "logging", "saving", "evaluation")


@dataclass(frozen=True)
class TrainResult:
    """What a stage left behind."""

    model_folder: Path
    log: list[dict[str, Any]]  # transformers' log history: one entry per logged step or evaluation
    was_finished: bool = False  # nothing was trained: the run had finished before


def train(recipe: Recipe, *, show_progress: bool = True) -> TrainResult:
    """Run one stage.

    The run's folder, `recipe.output_dir`, receives `recipe.yaml`, `checkpoint-N` folders, TensorBoard's `runs`,
    `log.json`, `training.png` and, at the end, `model`: what `load_pretrained_model` opens and the next stage starts
    from. Called again after a kill, it goes on from the newest checkpoint and ends with the same weights.

    Raises:
        OSError: if data, model or folder cannot be read or written.
        ValueError: if the recipe, a row, or the folder's earlier recipe does not fit.
        FloatingPointError: at the first loss or gradient that is no finite number.
    """
    run = run_folder(recipe)
    _require_same_recipe(recipe, run)
    if (run / MODEL_FOLDER).is_dir():
        logger.info("%s has finished before", run)
        return TrainResult(
            run / MODEL_FOLDER, json.loads((run / LOG_FILE).read_text()), was_finished=True
        )
    if recipe.stage == "router":
        return _train_router(recipe, run, show_progress=show_progress)
    checkpoint = newest_checkpoint(run)
    if checkpoint is not None:
        logger.info("going on from %s", checkpoint)
    arguments = training_arguments(
        recipe, show_progress=show_progress, resumes=checkpoint is not None
    )
    data = read_data(recipe)
    model, loaded = prepare_model(recipe)
    if recipe.parallel == "fsdp2":
        if checkpoint is not None:
            sharding.load_checkpoint(model, checkpoint)
        sharding.shard(loaded.model, arguments.device)
    trainer = build_trainer(recipe, arguments, data, model, loaded)
    if trainer.accelerator.is_main_process:
        _begin(recipe, run)
    trainer.accelerator.wait_for_everyone()
    _train_or_load(trainer, checkpoint)
    _finish(recipe, trainer, run)
    return TrainResult(run / MODEL_FOLDER, trainer.state.log_history)


def build_trainer(
    recipe: Recipe, arguments: TrainingArguments, data: TrainData, model: Any, loaded: LoadedModel
) -> MoeLlavaTrainer:
    """The trainer of a stage, ready to run.

    Args:
        arguments: of `training_arguments`.
        data: of `read_data`.
        model, loaded: of `prepare_model`.
    """
    collator = build_collator(recipe, loaded.processor)
    lengths = row_lengths(data.train, collator) if recipe.data.group_by_length else None
    if recipe.data.features is not None:
        collator.patch_tokens = _features(recipe, arguments, data, loaded)
    return MoeLlavaTrainer(
        model,
        arguments,
        loaded=loaded,
        collator=collator,
        train_rows=data.train,
        evaluation_rows=data.evaluation,
        lengths=lengths,
        keep_checkpoints=recipe.saving.keep,
        num_answers=recipe.evaluation.num_answers if data.evaluation is not None else 0,
        max_new_tokens=recipe.evaluation.max_new_tokens,
    )


def _features(
    recipe: Recipe, arguments: TrainingArguments, data: TrainData, loaded: LoadedModel
) -> ImageFeatures:
    """What the frozen tower makes of every image; encoded by the first process, while the others wait for the file."""
    tower = loaded.model.model.vision_tower
    if any(weight.requires_grad for weight in tower.parameters()):
        raise ValueError(
            "data.features keeps what a frozen tower gives, but trainable names 'vision_tower'."
        )
    return encode_rows(
        tower.to(arguments.device),
        [*data.train, *(data.evaluation or ())],
        Path(str(recipe.data.features)).expanduser(),
        dtype=torch.float32 if recipe.optim.precision == "fp32" else torch.bfloat16,
        autocast=recipe.optim.precision == "bf16",
        progress=not arguments.disable_tqdm,
        encodes=arguments.process_index == 0,
    )


def _require_same_recipe(recipe: Recipe, run: Path) -> None:
    """A run is gone on with only by the recipe that began it."""
    if not (run / RECIPE_FILE).is_file():
        return
    old = yaml.safe_load((run / RECIPE_FILE).read_text())
    new = recipe_to_dict(recipe)
    changed = [
        f"{key}: {old.get(key)!r} then, {new.get(key)!r} now"
        for key in {**old, **new}
        if key not in _FREE_KEYS and old.get(key) != new.get(key)
    ]
    if changed:
        raise ValueError(
            f"{run} holds a run of another recipe ({'; '.join(changed)}). Give the same settings to go on with it, or "
            "another output_dir."
        )


def _begin(recipe: Recipe, run: Path) -> None:
    run.mkdir(parents=True, exist_ok=True)
    clear_staging(run)
    fresh = run / f".{RECIPE_FILE}"
    fresh.write_text(yaml.safe_dump(recipe_to_dict(recipe), sort_keys=False))
    fresh.replace(run / RECIPE_FILE)  # whole, or the old one


def _train_or_load(trainer: MoeLlavaTrainer, checkpoint: Path | None) -> None:
    """Train, unless the checkpoint is that of the last step: the Trainer would go one step beyond it."""
    if checkpoint is not None:
        state = TrainerState.load_from_json(str(checkpoint / TRAINER_STATE_NAME))
        if state.global_step >= state.max_steps:
            trainer._load_from_checkpoint(str(checkpoint))
            trainer.state = state
            return
    trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))


def _finish(recipe: Recipe, trainer: MoeLlavaTrainer, run: Path) -> None:
    """Write the model, last and in one step: a folder `model` means that the stage has finished."""
    log, is_main = trainer.state.log_history, trainer.accelerator.is_main_process
    with writing(run, MODEL_FOLDER) as folder:
        if recipe.lora is None:
            trainer.save_model(str(folder))
        else:
            _save_merged(recipe, trainer, staging_folder(run) / ADAPTER_FOLDER, folder)
        trainer.accelerator.wait_for_everyone()
        if is_main:
            (folder / "training_args.bin").unlink(
                missing_ok=True
            )  # a pickle, with paths of this machine
            trainer.loaded.processor.save_pretrained(folder)
            numbers = {
                "steps": trainer.state.global_step,
                "rows": len(trainer.sampler),
                "seed": recipe.seed,
            }
            write_history(folder, find_start(recipe), stage=recipe.stage, **numbers)
            (run / LOG_FILE).write_text(json.dumps(log, indent=1) + "\n")
            save_picture(log, run / PICTURE_FILE, title=f"stage {recipe.stage}")
            if recipe.lora is not None:
                publish(staging_folder(run) / ADAPTER_FOLDER, run / ADAPTER_FOLDER)
            publish(folder, run / MODEL_FOLDER)
    if is_main:
        clear_staging(run)
    trainer.accelerator.wait_for_everyone()


def _save_merged(recipe: Recipe, trainer: MoeLlavaTrainer, adapter: Path, folder: Path) -> None:
    """The adapters as PEFT saves them, and the ordinary model that they make of the one that was started from."""
    trainer.save_model(str(adapter))
    if not trainer.accelerator.is_main_process:
        return
    (adapter / "training_args.bin").unlink(missing_ok=True)
    if trainer.is_sharded:  # no process has the whole model, so it is built again
        merged = merge_adapters(build_model(recipe).model, adapter)
    else:
        adapted: Any = trainer.model
        merged = adapted.merge_and_unload()
    merged.save_pretrained(folder)


def _train_router(recipe: Recipe, run: Path, *, show_progress: bool) -> TrainResult:
    data = read_data(recipe)
    router, labels, log = fit_router(recipe, data, show_progress=show_progress)
    _begin(recipe, run)
    with writing(run, MODEL_FOLDER) as folder:
        folder.mkdir(parents=True)
        save_router(router, labels, folder)
        write_history(
            folder, find_start(recipe), stage="router", rows=len(data.train), seed=recipe.seed
        )
        (run / LOG_FILE).write_text(json.dumps(log, indent=1) + "\n")
        publish(folder, run / MODEL_FOLDER)
    clear_staging(run)
    return TrainResult(run / MODEL_FOLDER, log)
