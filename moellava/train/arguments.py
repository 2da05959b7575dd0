"""A recipe's words → transformers' `TrainingArguments`: `training_arguments`, `arguments_of`."""

import json
import os
from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import fields
from pathlib import Path
from types import MappingProxyType
from typing import Any, TypeVar

import torch
from accelerate.utils import get_int_from_env, is_deepspeed_available, parse_flag_from_env
from transformers import TrainingArguments
from transformers.integrations.deepspeed import set_hf_deepspeed_config, unset_hf_deepspeed_config
from transformers.integrations.integration_utils import (
    INTEGRATION_TO_CALLBACK,
    get_available_reporting_integrations,
)

from moellava.messages import unknown_name
from moellava.storage.errors import reading
from moellava.train.options import Recipe
from moellava.train.run_folder import run_folder

Arguments = TypeVar("Arguments", bound=TrainingArguments)

# With these, whole checkpoints and exact resuming would be lost without a word.
_REFUSED = (
    "auto_find_batch_size",
    "ignore_data_skip",
    "load_best_model_at_end",
    "push_to_hub",
    "restore_callback_states_from_checkpoint",
    "resume_from_checkpoint",
    "save_only_model",
    "save_total_limit",
)


def training_arguments(
    recipe: Recipe, *, show_progress: bool = True, resumes: bool = False
) -> TrainingArguments:
    """transformers' arguments: `arguments_of` its own class."""
    return arguments_of(TrainingArguments, recipe, show_progress=show_progress, resumes=resumes)


def arguments_of(
    make: type[Arguments],
    recipe: Recipe,
    *,
    show_progress: bool = True,
    resumes: bool = False,
    more: Mapping[str, object] = MappingProxyType({}),
) -> Arguments:
    """The arguments of a trainer.

    Args:
        make: `TrainingArguments`, or a subclass such as TRL's.
        more: what the subclass takes beside.
        resumes: whether the run resumes from a checkpoint, whose evaluation is in its log.

    Raises:
        ValueError: for a key in `trainer` that is unknown or has a key of its own, a batch size
            that does not divide, or an engine that this machine does not have.
        ImportError: if a package of `logging.report_to` is not installed.
    """
    optim, trainer = recipe.optim, dict(recipe.trainer)
    evaluates = recipe.data.evaluation is not None
    num_processes = get_int_from_env(("WORLD_SIZE",), 1)
    at_once = optim.per_device_batch_size * num_processes
    if optim.batch_size % at_once:
        raise ValueError(
            f"optim.batch_size={optim.batch_size} is not a multiple of "
            f"optim.per_device_batch_size={optim.per_device_batch_size} times {num_processes} "
            "processes. Choose values that divide."
        )
    settings: dict[str, object] = {
        "output_dir": str(run_folder(recipe)),
        "per_device_train_batch_size": optim.per_device_batch_size,
        "per_device_eval_batch_size": optim.per_device_batch_size,
        "gradient_accumulation_steps": optim.batch_size // at_once,
        "learning_rate": optim.learning_rate,
        "num_train_epochs": optim.epochs,
        "max_steps": optim.max_steps if optim.max_steps is not None else -1,
        "lr_scheduler_type": optim.schedule,
        "warmup_steps": optim.warmup,  # a share if it is below 1
        "weight_decay": optim.weight_decay,
        "max_grad_norm": optim.max_grad_norm,
        "optim": optim.optimizer,
        "bf16": optim.precision != "fp32",
        "activation_checkpointing": optim.activation_checkpointing,
        "torch_compile": optim.compile,
        "logging_steps": recipe.logging.every,
        "logging_nan_inf_filter": False,  # a non-finite loss stops the run instead
        "report_to": list(recipe.logging.report_to) or "none",
        "save_strategy": "steps",
        "save_steps": recipe.saving.every,
        "eval_strategy": "steps" if evaluates else "no",
        "eval_steps": recipe.evaluation.every if evaluates else None,
        "dataloader_num_workers": recipe.data.num_workers,
        # Kept workers would draw no seed at the second epoch, new ones of a resumed run would:
        # other random numbers.
        "dataloader_persistent_workers": False,
        "remove_unused_columns": False,
        "disable_tqdm": not show_progress,
        "seed": recipe.seed,
        **more,
    }
    defaults: dict[str, object] = {
        "use_cpu": torch.accelerator.current_accelerator(check_available=True) is None,
        "eval_on_start": evaluates and not resumes,
        "dataloader_pin_memory": torch.cuda.is_available(),
        "ddp_find_unused_parameters": True,  # a batch without an image leaves the projector out
    }
    _require_allowed(trainer, settings, make)
    _require_engine(recipe)
    _require_reporters(recipe.logging.report_to)
    arguments: dict[str, Any] = {**defaults, **settings, **trainer}
    return make(**arguments)


def _require_allowed(
    trainer: Collection[str], settings: Collection[str], make: type[TrainingArguments]
) -> None:
    """Refuse what the arguments do not know, or what a recipe says in another place."""
    known = [f"trainer.{item.name}" for item in fields(make)]
    for name in trainer:
        if f"trainer.{name}" not in known:
            raise unknown_name("recipe key", f"trainer.{name}", known)
        if name in settings:
            raise ValueError(
                f"trainer.{name} has a key of its own in the recipe: see moellava.train.Recipe."
            )
        if name in _REFUSED:
            raise ValueError(
                f"trainer.{name} would break whole checkpoints or exact resuming. Leave it out."
            )


def _require_engine(recipe: Recipe) -> None:
    """Refuse what would quietly become something else."""
    wants_fsdp = parse_flag_from_env("ACCELERATE_USE_FSDP") or bool(recipe.trainer.get("fsdp"))
    if wants_fsdp and torch.accelerator.current_accelerator(check_available=True) is None:
        raise ValueError(
            "accelerate has no FSDP without a GPU and would run DDP instead. Use parallel=fsdp2 "
            "with torchrun, which shards through torch's own fully_shard, or accelerate's DDP "
            "config."
        )
    wants_deepspeed = parse_flag_from_env("ACCELERATE_USE_DEEPSPEED") or bool(
        recipe.trainer.get("deepspeed")
    )
    if recipe.parallel == "fsdp2" and (wants_fsdp or wants_deepspeed):
        raise ValueError(
            "parallel=fsdp2 shards by itself. Leave it out, or accelerate's FSDP or DeepSpeed "
            "config."
        )
    if wants_deepspeed and not is_deepspeed_available():
        raise ImportError(
            "The accelerate config asks for DeepSpeed, which is not installed. Type: pip install "
            "deepspeed"
        )
    if recipe.lora is not None and wants_fsdp:
        raise ValueError(
            "Adapters under accelerate's FSDP could not be merged whole at the end. Use "
            "parallel=fsdp2 with torchrun, or DDP."
        )
    if wants_deepspeed and _zero_stage(recipe) == 3:
        _require_whole_weights(recipe)


def _require_whole_weights(recipe: Recipe) -> None:
    """Refuse a ZeRO-3 that would end without a model."""
    if recipe.lora is not None:
        raise ValueError(
            "Adapters under DeepSpeed's ZeRO-3 could not be merged whole at the end. Use ZeRO-2 or "
            "less, DDP, or parallel=fsdp2."
        )
    options = _zero_options(recipe)
    gathers = parse_flag_from_env("ACCELERATE_DEEPSPEED_ZERO3_SAVE_16BIT_MODEL")
    if not (gathers or options.get("stage3_gather_16bit_weights_on_model_save")):
        raise ValueError(
            "DeepSpeed's ZeRO-3 would save pieces of the weights and no model. Set "
            "zero3_save_16bit_model: true in the accelerate config (the packaged "
            "deepspeed_zero3.yaml has it), or stage3_gather_16bit_weights_on_model_save: true "
            "under zero_optimization of a DeepSpeed config."
        )


def _zero_stage(recipe: Recipe) -> int:
    stage = _zero_options(recipe).get("stage")
    own = os.environ.get("ACCELERATE_DEEPSPEED_ZERO_STAGE", "2") if stage is None else stage
    return int(str(own))


def _zero_options(recipe: Recipe) -> Mapping[str, object]:
    """`zero_optimization` of the DeepSpeed config that the recipe or accelerate's names."""
    config = recipe.trainer.get("deepspeed") or os.environ.get("ACCELERATE_DEEPSPEED_CONFIG_FILE")
    if isinstance(config, str):
        with reading(config, "a DeepSpeed config"):
            config = json.loads(Path(config).read_text(encoding="utf-8"))
    options = config.get("zero_optimization") if isinstance(config, Mapping) else None
    return options if isinstance(options, Mapping) else {}


@contextmanager
def read_whole(arguments: TrainingArguments) -> Iterator[None]:
    """Models are read whole in here, under DeepSpeed's ZeRO-3 too.

    transformers would split the weights among the processes while it reads them, and fails on a
    model that is put together from several checkpoints. DeepSpeed splits the whole model later.
    """
    config = getattr(arguments, "hf_deepspeed_config", None)
    unset_hf_deepspeed_config()
    try:
        yield
    finally:
        if config is not None:
            set_hf_deepspeed_config(config)


def _require_reporters(names: Iterable[str]) -> None:
    available = get_available_reporting_integrations()
    for name in names:
        if name not in INTEGRATION_TO_CALLBACK:
            raise unknown_name("name in logging.report_to:", name, INTEGRATION_TO_CALLBACK)
        if name not in available:
            raise ImportError(
                f"logging.report_to names {name!r}, which is not installed. Type: pip install "
                f"{name}"
            )
