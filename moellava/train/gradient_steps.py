"""The stages that train by gradient steps: rows, model and trainer of a recipe, run to the end.

| name | what it does |
|---|---|
| `train_by_gradient` | runs such a stage in its folder |
| `build_trainer` | the trainer of a stage, ready to run |
"""

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, cast

import torch
from torch import nn
from transformers import TrainerState, TrainingArguments
from transformers.trainer import TRAINER_STATE_NAME

from moellava.model.builder_enhanced import load_pretrained_model
from moellava.model.loaded_model import LoadedModel
from moellava.storage.errors import reading
from moellava.train import sharding
from moellava.train.adapters import merge_adapters
from moellava.train.arguments import training_arguments
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
from moellava.train.log.moved import Moved, movement, num_learning
from moellava.train.log.picture import save_picture
from moellava.train.options import Recipe
from moellava.train.prepare import build_model, prepare_model
from moellava.train.run_folder import (
    ADAPTER_FOLDER,
    MODEL_FOLDER,
    PICTURE_FILE,
    begin_run,
    require_log,
    write_log,
)
from moellava.train.stage import LogEntry, TrainResult
from moellava.train.start import find_start
from moellava.train.trainer import MoeLlavaTrainer

if TYPE_CHECKING:
    from peft import PeftModel

logger = logging.getLogger(__name__)

# What a resumed run goes on with.
_STATE_TYPES: dict[str, tuple[type, ...]] = {
    "global_step": (int,),
    "max_steps": (int,),
    "epoch": (int, float),
    "log_history": (list,),
    "stateful_callbacks": (dict,),
}


def train_by_gradient(recipe: Recipe, run: Path, show_progress: bool) -> TrainResult:
    """Train a stage's model, from the newest checkpoint if there is one."""
    checkpoint = newest_checkpoint(run)
    if checkpoint is not None:
        _require_resumable(checkpoint)
        logger.info("resuming from %s", checkpoint)
    arguments = training_arguments(
        recipe, show_progress=show_progress, resumes=checkpoint is not None
    )
    data = read_data(recipe, show_progress=show_progress and arguments.process_index == 0)
    model, loaded = prepare_model(recipe)
    if recipe.parallel == "fsdp2":
        if checkpoint is not None:
            sharding.load_checkpoint(model, checkpoint)
        sharding.shard(loaded.model, arguments.device)
    trainer = build_trainer(recipe, arguments, data, model, loaded)
    if trainer.accelerator.is_main_process:
        begin_run(recipe, run)
    trainer.accelerator.wait_for_everyone()
    try:
        _train_or_load(trainer, checkpoint)
    finally:
        trainer.close_progress_bar()  # an error begins on a line of its own
    _finish(recipe, trainer, run)
    return TrainResult(run / MODEL_FOLDER, trainer.state.log_history)


def build_trainer(
    recipe: Recipe,
    arguments: TrainingArguments,
    data: TrainData,
    model: nn.Module,
    loaded: LoadedModel,
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
        features = Path(recipe.data.features).expanduser()
        collator.patch_tokens = _features(recipe, features, arguments, data, loaded)
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
        scorers=recipe.evaluation.scorers,
        max_new_tokens=recipe.evaluation.max_new_tokens,
        rates=recipe.optim.rates,
    )


def _features(
    recipe: Recipe,
    file: Path,
    arguments: TrainingArguments,
    data: TrainData,
    loaded: LoadedModel,
) -> ImageFeatures:
    """What the frozen tower makes of every image.

    The first process encodes, while the others wait for the file.
    """
    return encode_rows(
        loaded.model.model.vision_tower.to(arguments.device),  # type: ignore[arg-type]  # a decorator hides `to`'s signature
        [*data.train, *(data.evaluation or ())],
        file,
        dtype=torch.float32 if recipe.optim.precision == "fp32" else torch.bfloat16,
        autocast=recipe.optim.precision == "bf16",
        progress=not arguments.disable_tqdm,
        encodes=arguments.process_index == 0,
    )


def _require_resumable(checkpoint: Path) -> None:
    """transformers would go on with an optimizer and random numbers that began anew."""
    # One file, or DeepSpeed's and accelerate's folders.
    states = {
        "the optimizer's state": ("optimizer*", "global_step*"),
        "step": (TRAINER_STATE_NAME,),
    }
    for what, patterns in states.items():
        if not any(True for pattern in patterns for _ in checkpoint.glob(pattern)):
            raise FileNotFoundError(
                f"{checkpoint} has no {patterns[0].replace('*', '.pt')}, so {what} is lost and the "
                "run could not resume as it was. Delete this folder to resume from the checkpoint "
                "before it, or to begin anew."
            )


def _train_or_load(trainer: MoeLlavaTrainer, checkpoint: Path | None) -> None:
    """Train, unless the checkpoint is of the last step: the Trainer would go one step beyond it."""
    if checkpoint is not None:
        state = read_state(checkpoint)
        if state.global_step >= state.max_steps:
            trainer.load_checkpoint(checkpoint)
            trainer.state = state
            return
    trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))


def read_state(checkpoint: Path) -> TrainerState:
    """The step, epoch and log of a checkpoint, as transformers wrote them.

    Raises:
        ValueError: if the file cannot be read, or is of another checkpoint.
    """
    path = checkpoint / TRAINER_STATE_NAME
    with reading(path, "a trainer's state"):
        state: TrainerState = TrainerState.load_from_json(str(path))
        for name, kinds in _STATE_TYPES.items():
            found = getattr(state, name)
            if not isinstance(found, kinds) or isinstance(found, bool):
                raise TypeError(f"{name} is a {type(found).__name__}")
        if checkpoint.name != f"checkpoint-{state.global_step}":
            raise ValueError(f"it is of step {state.global_step}")
        require_log(state.log_history)
        if not all(isinstance(entry.get("step"), int) for entry in state.log_history):
            raise TypeError("an entry of its log_history has no step")
    return state


def _finish(recipe: Recipe, trainer: MoeLlavaTrainer, run: Path) -> None:
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
    recipe: Recipe, trainer: MoeLlavaTrainer, run: Path, folder: Path, moved: list[Moved]
) -> None:
    """What stands beside the weights, and the move of the folder to its place."""
    log: list[LogEntry] = trainer.state.log_history
    log.append({"step": trainer.state.global_step, "moved": moved})
    numbers = {
        "steps": trainer.state.global_step,
        "rows": len(trainer.sampler),
        "seed": recipe.seed,
    }
    write_history(folder, find_start(recipe), stage=recipe.stage, **numbers)
    write_log(log, run)
    save_picture(log, run / PICTURE_FILE, title=f"stage {recipe.stage}")
    if recipe.lora is not None:
        publish(staging_folder(run) / ADAPTER_FOLDER, run / ADAPTER_FOLDER)
    publish(folder, run / MODEL_FOLDER)


def _movement(
    recipe: Recipe, trainer: MoeLlavaTrainer, folder: Path, learning: Mapping[str, int]
) -> list[Moved]:
    """How far each part is from where the stage began, which is built again to be compared.

    Args:
        folder: the written model, read where no process has the whole of it.
        learning: of `num_learning`, before adapters were merged.
    """
    trained = trainer.loaded.model
    if trainer.is_sharded or trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled:
        trained = load_pretrained_model(folder).model
    after = dict(trained.named_parameters())
    return movement(build_model(recipe).model.named_parameters(), after, learning)


def _save_merged(recipe: Recipe, trainer: MoeLlavaTrainer, adapter: Path, folder: Path) -> None:
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
