"""The stages that train by gradient steps: rows, model and trainer of a recipe, run to the end.

| name | what it does |
|---|---|
| `train_by_gradient` | runs such a stage in its folder |
| `build_trainer` | the trainer of a stage, ready to run |
| `resumable_checkpoint`, `read_state` | where an earlier run stopped |
| `run_stage` | a trainer's run from beginning to end, for any loss |
"""

import logging
from pathlib import Path

import torch
from torch import nn
from transformers import TrainerState, TrainingArguments
from transformers.trainer import TRAINER_STATE_NAME

from moellava.model.loaded_model import LoadedModel
from moellava.storage.errors import reading
from moellava.train import sharding
from moellava.train.arguments import read_whole, training_arguments
from moellava.train.batches import TrainData, build_collator, read_data, row_lengths
from moellava.train.checkpoints import newest_checkpoint
from moellava.train.features import ImageFeatures, encode_rows
from moellava.train.finish import finish
from moellava.train.options import Recipe
from moellava.train.prepare import prepare_model
from moellava.train.run_folder import MODEL_FOLDER, begin_run, require_log
from moellava.train.stage import TrainResult
from moellava.train.stage_trainer import StageTrainer
from moellava.train.trainer import MoeLlavaTrainer

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
    checkpoint = resumable_checkpoint(run)
    arguments = training_arguments(
        recipe, show_progress=show_progress, resumes=checkpoint is not None
    )
    data = read_data(recipe, show_progress=show_progress and arguments.process_index == 0)
    with read_whole(arguments):
        model, loaded = prepare_model(recipe)
    if recipe.parallel == "fsdp2":
        if checkpoint is not None:
            sharding.load_checkpoint(model, checkpoint)
        sharding.shard(loaded.model, arguments.device)
    return run_stage(recipe, build_trainer(recipe, arguments, data, model, loaded), checkpoint)


def run_stage(recipe: Recipe, trainer: StageTrainer, checkpoint: Path | None) -> TrainResult:
    """Train in the run's folder, and write the model.

    Args:
        checkpoint: of `resumable_checkpoint`, which training resumes from.
    """
    if trainer.accelerator.is_main_process:
        begin_run(recipe, trainer.run)
    trainer.accelerator.wait_for_everyone()
    try:
        _train_or_load(trainer, checkpoint)
    finally:
        trainer.close_progress_bar()  # an error begins on a line of its own
    finish(recipe, trainer, trainer.run)
    return TrainResult(trainer.run / MODEL_FOLDER, trainer.state.log_history)


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
        processor=loaded.processor,
        encodes=arguments.process_index == 0,
    )


def resumable_checkpoint(run: Path) -> Path | None:
    """The newest checkpoint of a run, None if there is none yet.

    Raises:
        FileNotFoundError: if it lacks what transformers would quietly begin anew: the optimizer's
            state, or the step.
    """
    checkpoint = newest_checkpoint(run)
    if checkpoint is None:
        return None
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
    logger.info("resuming from %s", checkpoint)
    return checkpoint


def _train_or_load(trainer: StageTrainer, checkpoint: Path | None) -> None:
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
