"""A recipe → a trained model in a folder, with its log and picture; a killed run is gone on with.

Public names: `train`, `TrainResult`, `read_data`, `build_trainer`, `build_collator`.
"""

import json
import logging
import os
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch
import yaml
from safetensors.torch import load_model
from transformers import TrainerState, TrainingArguments
from transformers.trainer import TRAINER_STATE_NAME

import moellava
from moellava.data import read_rows
from moellava.data.chat_labels import num_chat_tokens
from moellava.data.collate import ChatCollator, messages_of
from moellava.data.images import load_image
from moellava.messages import unknown_name
from moellava.train.checkpoints import clear_staging, newest_checkpoint, publish, staging_folder
from moellava.train.features import encode_rows
from moellava.train.picture import save_picture
from moellava.train.recipe import Recipe, recipe_to_dict
from moellava.train.sharding import shard
from moellava.train.stages import MODEL_FOLDER, find_start, prepare_model, read_history, write_history
from moellava.train.trainer import MoeLlavaTrainer

logger = logging.getLogger(__name__)

RECIPE_FILE, LOG_FILE, PICTURE_FILE = "recipe.yaml", "log.json", "training.png"
# Keys that may change between a kill and going on: they do not change the weights.
_FREE_KEYS = ("output_dir", "logging", "saving", "evaluation", "parallel")


@dataclass(frozen=True)
class TrainResult:
    """What a stage left behind."""

    model_folder: Path
    log: list[dict[str, Any]]  # transformers' log history: one entry per logged step or evaluation
    was_finished: bool = False  # nothing was trained: the run had finished before


@dataclass(frozen=True)
class TrainData:
    """The rows to learn from, and the held-out ones."""

    train: Sequence[Any]
    evaluation: Sequence[Any] | None


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
    if (run / MODEL_FOLDER).is_dir():
        _require_same_recipe(recipe, run)
        logger.info("%s has finished before", run)
        return TrainResult(run / MODEL_FOLDER, json.loads((run / LOG_FILE).read_text()), was_finished=True)
    if recipe.stage == "router":
        from moellava.train.router_fit import fit_router

        return TrainResult(fit_router(recipe, show_progress=show_progress), [])
    arguments = training_arguments(recipe, show_progress=show_progress)
    data = read_data(recipe)
    model, loaded = prepare_model(recipe)
    _require_same_recipe(recipe, run)
    checkpoint = newest_checkpoint(run)
    if checkpoint is not None:
        logger.info("going on from %s", checkpoint)
    if recipe.parallel == "fsdp2" and arguments.world_size > 1:
        if recipe.lora is not None:
            raise ValueError("parallel=fsdp2 splits the whole model and cannot merge adapters. Use DDP with lora.")
        if checkpoint is not None:
            load_model(loaded.model, checkpoint / "model.safetensors")
        shard(loaded.model, arguments.device)
    trainer = build_trainer(recipe, arguments, data, model, loaded)
    if trainer.accelerator.is_main_process:
        run.mkdir(parents=True, exist_ok=True)
        clear_staging(run)
        (run / RECIPE_FILE).write_text(yaml.safe_dump(recipe_to_dict(recipe), sort_keys=False))
    trainer.accelerator.wait_for_everyone()
    _train_or_load(trainer, checkpoint)
    _finish(recipe, trainer, loaded, run, len(data.train))
    return TrainResult(run / MODEL_FOLDER, trainer.state.log_history)


def _train_or_load(trainer: MoeLlavaTrainer, checkpoint: Path | None) -> None:
    """Train, unless the checkpoint is that of the last step: the Trainer would go one step beyond it."""
    if checkpoint is not None:
        state = TrainerState.load_from_json(str(checkpoint / TRAINER_STATE_NAME))
        if state.global_step >= state.max_steps:
            trainer._load_from_checkpoint(str(checkpoint))
            trainer.state = state
            return
    trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))


def run_folder(recipe: Recipe) -> Path:
    """`output_dir` as a path; its absence is an error."""
    if not recipe.output_dir:
        raise ValueError("The recipe has no output_dir. Add output_dir=runs/NAME.")
    return Path(recipe.output_dir).expanduser()


def read_data(recipe: Recipe) -> TrainData:
    """The rows that the recipe names.

    Raises:
        OSError: if they cannot be found.
        ValueError: for a malformed row (unless `data.skip_bad`), or if there is none.
    """
    options = recipe.data
    if options.train is None:
        raise ValueError("The recipe names no training data. Add data.train=FILE (and data.images=FOLDER).")
    common: dict[str, Any] = {"images": options.images, "format": options.format, "skip_bad": options.skip_bad}
    rows = read_rows(options.train, split=options.train_split, **common)
    evaluation: Any = None
    if options.evaluation is not None:
        evaluation = read_rows(options.evaluation, split=options.evaluation_split, **common)
        if recipe.evaluation.num_rows is not None:
            evaluation = [evaluation[index] for index in range(min(recipe.evaluation.num_rows, len(evaluation)))]
    for name, found in (("data.train", rows), ("data.evaluation", evaluation)):
        if found is not None and len(found) == 0:
            raise ValueError(f"{name} is {getattr(options, name.partition('.')[2])!r}, which has no rows.")
    return TrainData(rows, evaluation)


def build_trainer(
    recipe: Recipe, arguments: TrainingArguments, data: TrainData, model: Any, loaded: Any
) -> MoeLlavaTrainer:
    """The trainer of a stage, ready to run."""
    options = recipe.data
    collator = build_collator(recipe, loaded)
    lengths = row_lengths(data.train, collator) if options.group_by_length else None
    if options.features is not None:
        tower = loaded.model.model.vision_tower
        if any(weight.requires_grad for weight in tower.parameters()):
            raise ValueError("data.features keeps what a frozen tower gives, but trainable names 'vision_tower'.")
        with arguments.main_process_first(desc="encoding images"):
            collator.patch_tokens = encode_rows(
                tower.to(arguments.device),
                [*data.train, *(data.evaluation or ())],
                Path(options.features).expanduser(),
                dtype=torch.float32 if recipe.optim.precision == "fp32" else torch.bfloat16,
                autocast=recipe.optim.precision == "bf16",
                progress=not arguments.disable_tqdm,
            )
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


def build_collator(recipe: Recipe, loaded: Any) -> ChatCollator:
    """The collator that the recipe's `data` describes."""
    options = recipe.data
    return ChatCollator(
        loaded.processor,
        chat_template=options.chat_template,
        max_length=options.max_length,
        long_rows=options.long_rows,
        packing=options.packing,
        load_image=load_image,
        return_row_ids=True,
    )


def row_lengths(rows: Sequence[Any], collator: ChatCollator) -> list[int]:
    """Tokens of each row, without opening an image.

    Raises:
        ValueError: naming the rows that are too long, before a step is trained.
    """
    lengths = num_chat_tokens([messages_of(row) for row in rows], collator.processor, collator.chat_template)
    limit = collator.max_length
    if limit is None:
        return lengths
    too_long = [index for index, length in enumerate(lengths) if length > limit]
    if too_long and collator.long_rows == "error":
        named = ", ".join(f"{rows[index].id!r} ({lengths[index]})" for index in too_long[:5])
        raise ValueError(
            f"{len(too_long)} of {len(lengths)} rows have more than data.max_length={limit} tokens: {named}"
            f"{', ...' if len(too_long) > 5 else ''}. Raise data.max_length, shorten them, or set "
            "data.long_rows=truncate."
        )
    if too_long:
        logger.warning("%d of %d rows are cut to %d tokens", len(too_long), len(lengths), limit)
    return [min(length, limit) for length in lengths]


def training_arguments(recipe: Recipe, *, show_progress: bool = True) -> TrainingArguments:
    """transformers' arguments, from the recipe's words.

    Raises:
        ValueError: for an unknown key in `trainer`, a batch size that does not divide, or an engine that this machine
            does not have.
    """
    optim = recipe.optim
    known = {item.name for item in fields(TrainingArguments)}
    for name in recipe.trainer:
        if name not in known:
            raise unknown_name("recipe key", f"trainer.{name}", [f"trainer.{key}" for key in known])
    _require_engine(recipe)
    num_processes = int(os.environ.get("WORLD_SIZE", "1"))
    at_once = optim.per_device_batch_size * num_processes
    if optim.batch_size % at_once:
        raise ValueError(
            f"optim.batch_size={optim.batch_size} is no multiple of optim.per_device_batch_size="
            f"{optim.per_device_batch_size} times {num_processes} processes. Choose ones that divide."
        )
    evaluates = recipe.data.evaluation is not None
    settings: dict[str, Any] = {
        "output_dir": str(run_folder(recipe)),
        "per_device_train_batch_size": optim.per_device_batch_size,
        "per_device_eval_batch_size": optim.per_device_batch_size,
        "gradient_accumulation_steps": optim.batch_size // at_once,
        "learning_rate": optim.learning_rate,
        "num_train_epochs": optim.epochs,
        "max_steps": optim.max_steps if optim.max_steps is not None else -1,
        "lr_scheduler_type": optim.schedule,
        "warmup_steps": optim.warmup,  # a share, where it is below 1
        "weight_decay": optim.weight_decay,
        "max_grad_norm": optim.max_grad_norm,
        "optim": optim.optimizer,
        "bf16": optim.precision != "fp32",
        "use_cpu": torch.accelerator.current_accelerator(check_available=True) is None,
        "activation_checkpointing": optim.activation_checkpointing,
        "torch_compile": optim.compile,
        "logging_steps": recipe.logging.every,
        "logging_nan_inf_filter": False,  # a number that is none stops the run instead
        "report_to": list(recipe.logging.report_to) or "none",
        "save_strategy": "steps",
        "save_steps": recipe.saving.every,
        "eval_strategy": "steps" if evaluates else "no",
        "eval_steps": recipe.evaluation.every if evaluates else None,
        "eval_on_start": evaluates,
        "dataloader_num_workers": recipe.data.num_workers,
        "dataloader_persistent_workers": recipe.data.num_workers > 0,
        "dataloader_pin_memory": torch.cuda.is_available(),
        "remove_unused_columns": False,
        "ddp_find_unused_parameters": True,  # a batch without an image leaves the projector out
        "disable_tqdm": not show_progress,
        "seed": recipe.seed,
    }
    return TrainingArguments(**{**settings, **recipe.trainer})


def _require_engine(recipe: Recipe) -> None:
    """accelerate on a CPU quietly runs DDP where FSDP was asked for."""
    wants_fsdp = os.environ.get("ACCELERATE_USE_FSDP", "").lower() in ("1", "true") or bool(recipe.trainer.get("fsdp"))
    if wants_fsdp and torch.accelerator.current_accelerator(check_available=True) is None:
        raise ValueError(
            "accelerate has no FSDP without a GPU and would run DDP instead. Use parallel=fsdp2 with torchrun, which "
            "shards through torch's own fully_shard, or accelerate's DDP config."
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


def _finish(recipe: Recipe, trainer: MoeLlavaTrainer, loaded: Any, run: Path, num_rows: int) -> None:
    """Write the model, last and in one step: a folder `model` means that the stage has finished."""
    start = find_start(recipe)
    history = read_history(Path(start)) if start is not None and Path(start).is_dir() else []
    entry = {"stage": recipe.stage, "steps": trainer.state.global_step, "rows": num_rows, "seed": recipe.seed}
    history.append({**entry, "moellava": moellava.__version__})
    with trainer._writing(MODEL_FOLDER) as folder:
        if recipe.lora is not None:
            adapted: Any = trainer.model
            if trainer.accelerator.is_main_process:
                adapted.save_pretrained(str(staging_folder(run) / "adapter"))
                adapted.merge_and_unload().save_pretrained(folder)
        else:
            trainer.save_model(str(folder))
        trainer.accelerator.wait_for_everyone()
        if trainer.accelerator.is_main_process:
            (folder / "training_args.bin").unlink(missing_ok=True)  # a pickle, with paths of this machine
            loaded.processor.save_pretrained(folder)
            write_history(folder, history)
    if trainer.accelerator.is_main_process:
        (run / LOG_FILE).write_text(json.dumps(trainer.state.log_history, indent=1) + "\n")
        save_picture(trainer.state.log_history, run / PICTURE_FILE, title=f"stage {recipe.stage}")
        if recipe.lora is not None:
            publish(staging_folder(run) / "adapter", run / "adapter")
        publish(folder, run / MODEL_FOLDER)
        clear_staging(run)
    trainer.accelerator.wait_for_everyone()
