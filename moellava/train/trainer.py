"""transformers' `Trainer` with what training a mixture on medical data needs: logs of the routers, answers to held-out
questions, checkpoints that are whole or not there, and a stop at the first number that is none.

Public names: `MoeLlavaTrainer`, `peak_memory_mib`.
"""

import logging
import shutil
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import Sampler
from transformers import ProgressCallback, Trainer, TrainingArguments
from transformers.trainer import OPTIMIZER_NAME, SCHEDULER_NAME
from transformers.trainer_callback import PrinterCallback
from transformers.trainer_pt_utils import LengthGroupedSampler

from moellava.data.collate import ChatCollator
from moellava.model.loaded_model import LoadedModel
from moellava.train.answers import answer_rows, share_exact
from moellava.train.checkpoints import checkpoints, newest_checkpoint, publish, remove, staging_folder
from moellava.train.nonfinite import first_nonfinite_module, nonfinite_tensors
from moellava.train.router_load import RouterLoad
from moellava.train.sharding import full_optimizer_state, full_state_dict, is_sharded, load_optimizer_state

logger = logging.getLogger(__name__)


class EpochLengthGroupedSampler(LengthGroupedSampler):
    """transformers' sampler, its order a function of seed and epoch alone, so that a resumed run finds it again."""

    def __init__(self, batch_size: int, lengths: Sequence[int], seed: int):
        super().__init__(batch_size, lengths=list(lengths), generator=torch.Generator())
        self.seed = seed
        self.set_epoch(0)

    def set_epoch(self, epoch: int) -> None:
        self.generator.manual_seed(self.seed + 1_000_003 * epoch)


class MoeLlavaTrainer(Trainer):
    """Trains one stage.

    Args:
        model: to train; `loaded.model` itself or a PEFT model around it.
        arguments: transformers'.
        loaded: the model with its processor.
        collator: with `return_row_ids=True`.
        train_rows, evaluation_rows: what the collator takes.
        lengths: tokens of each training row, to group rows of like length; None shuffles them.
        keep_checkpoints: how many of the newest stay.
        num_answers, max_new_tokens: held-out questions answered at each evaluation.
    """

    def __init__(
        self,
        model: nn.Module,
        arguments: TrainingArguments,
        *,
        loaded: LoadedModel,
        collator: ChatCollator,
        train_rows: Any,
        evaluation_rows: Any = None,
        lengths: Sequence[int] | None = None,
        keep_checkpoints: int = 2,
        num_answers: int = 0,
        max_new_tokens: int = 32,
    ):
        super().__init__(
            model=model,
            args=arguments,
            data_collator=collator,
            train_dataset=train_rows,
            eval_dataset=evaluation_rows,
        )
        # Leaves placing and gradients to FSDP2, as for a model that transformers has split. Set behind the Trainer's
        # own checks, which refuse to save such a model; here it is saved whole.
        self.is_distributed_loading_by_transformers = is_sharded(loaded.model)
        self.run = Path(str(arguments.output_dir))
        self.loaded, self.collator = loaded, collator
        self.lengths = lengths
        self.keep_checkpoints = keep_checkpoints
        self.num_answers, self.max_new_tokens = num_answers, max_new_tokens
        text_config = loaded.model.config.text_config
        self.is_mixture = hasattr(text_config, "num_experts")
        if self.is_mixture:
            self.router_load = RouterLoad(text_config.num_experts, text_config.num_experts_per_tok)
        tower = loaded.model.model.vision_tower
        self.frozen_tower = None if any(weight.requires_grad for weight in tower.parameters()) else tower
        self._staging: Path | None = None
        self._row_ids: list[Any] = []
        self._reset_counters()
        for callback in (ProgressCallback, PrinterCallback):
            self.remove_callback(callback)
        if not arguments.disable_tqdm:
            self.add_callback(_Progress())

    # Data

    def _get_train_sampler(self, train_dataset: Any = None) -> Sampler[Any] | None:
        if self.lengths is None:
            return super()._get_train_sampler(train_dataset)
        group = self.args.train_batch_size * self.args.gradient_accumulation_steps * self.args.world_size
        return EpochLengthGroupedSampler(group, self.lengths, self.args.data_seed or self.args.seed)

    # One step

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Any = None,
    ) -> Any:
        inputs = dict(inputs)
        self._row_ids = inputs.pop("row_ids", [])
        if self.frozen_tower is not None:
            self.frozen_tower.eval()  # running statistics and dropout of a frozen tower stay as they are
        inputs["use_cache"] = False
        if self.is_mixture:
            inputs["output_router_logits"] = True
        loss, outputs = super().compute_loss(model, inputs, return_outputs=True, num_items_in_batch=num_items_in_batch)
        if not bool(loss.isfinite()):
            self._stop("loss", inputs)
        if model.training:
            self._count(inputs, outputs)
        if self.is_mixture:
            outputs.router_logits = None  # evaluation would gather them
        return (loss, outputs) if return_outputs else loss

    def _get_grad_norm(self, model: nn.Module, grad_norm: Any = None) -> Any:
        norm = super()._get_grad_norm(model, grad_norm)
        if not bool(torch.as_tensor(norm).isfinite()):
            self._stop("gradient", {})
        return norm

    def _stop(self, what: str, inputs: Mapping[str, Any]) -> None:
        """Raise before a weight or a checkpoint is spoilt."""
        model: Any = self.loaded.model
        weights = nonfinite_tensors(model.named_parameters())
        if weights:
            where = f"The weights {', '.join(weights)} are not finite"
        elif what == "gradient":
            names = nonfinite_tensors((name, weight.grad) for name, weight in model.named_parameters())
            where = f"The gradients of {', '.join(names) or 'some weights'} are not finite"
        else:
            where = "It cannot be repeated with a sharded model"
            if not self.is_fsdp_enabled and not self.is_deepspeed_enabled and not is_sharded(model):
                inputs = {name: value for name, value in inputs.items() if name != "num_items_in_batch"}
                first = first_nonfinite_module(model, inputs)
                where = f"The first output that is not finite is that of {first}" if first else "The outputs are finite"
        good = newest_checkpoint(self.run)
        raise FloatingPointError(
            f"The {what} of step {self.state.global_step + 1} is no finite number. {where}. Rows of the batch: "
            f"{self._row_ids}. The last good checkpoint is {good.name if good else 'none'}; nothing was written "
            "after it. Look at these rows, or lower optim.learning_rate, and start the recipe again."
        )

    # Logs

    def _reset_counters(self) -> None:
        self._num_tokens: Any = 0
        self._aux_losses: list[Tensor] = []
        self._since = time.perf_counter()

    def _count(self, inputs: Mapping[str, Any], outputs: Any) -> None:
        mask = inputs.get("attention_mask")
        self._num_tokens = self._num_tokens + (inputs["input_ids"].numel() if mask is None else mask.sum())
        if self.is_mixture:
            is_image = inputs["input_ids"] == self.loaded.model.config.image_token_id
            self.router_load.add(outputs.router_logits, is_image, mask)
            self._aux_losses.append(outputs.aux_loss.detach())

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """As the Trainer's; a step's entry also has `aux_loss`, `tokens_per_second`, `memory_mib` and `load`.

        In the log history, `load` is `{"image": [[share of each expert] of each sparse layer], "text": ...}`;
        TensorBoard and its kin get one number for each.
        """
        load: dict[str, list[list[float]]] = {}
        flat: dict[str, float] = {}
        if "loss" in logs:
            logs, load = {**logs, **self._step_numbers()}, self._flush_load()
            layers = self.loaded.model.config.text_config.moe_layer_indices if load else []
            for kind, shares in load.items():
                for layer, row in zip(layers, shares, strict=True):
                    flat |= {f"load_{kind}/layer{layer}_expert{expert}": share for expert, share in enumerate(row)}
        super().log({**logs, **flat}, start_time)
        entry: dict[str, Any] = self.state.log_history[-1]
        for name in flat:
            entry.pop(name, None)
        if load:
            entry["load"] = load
        if "loss" in logs:
            self._reset_counters()

    def _step_numbers(self) -> dict[str, float]:
        tokens = self._sum(torch.as_tensor(self._num_tokens, dtype=torch.float32, device=self.args.device))
        numbers = {"tokens_per_second": float(tokens) / (time.perf_counter() - self._since)}
        if self._aux_losses:
            aux_loss = torch.stack(self._aux_losses).mean()
            numbers["aux_loss"] = float(self._sum(aux_loss)) / self.accelerator.num_processes
        return {**numbers, "memory_mib": peak_memory_mib(self.args.device)}

    def _flush_load(self) -> dict[str, list[list[float]]]:
        return self.router_load.flush(self._sum) if self.is_mixture else {}

    def _sum(self, tensor: Tensor) -> Tensor:
        summed: Tensor = self.accelerator.reduce(tensor, reduction="sum")
        return summed

    # Evaluation

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        """As the Trainer's, and the answers to the first held-out questions."""
        began = time.perf_counter()
        metrics = super().evaluate(*args, **kwargs)
        if self.num_answers:
            rows = [self.eval_dataset[index] for index in range(min(self.num_answers, len(self.eval_dataset)))]  # type: ignore[arg-type, index]
            answers = answer_rows(
                self.loaded,
                rows,
                self.collator,
                max_new_tokens=self.max_new_tokens,
                batch_size=self.args.eval_batch_size,
            )
            metrics["eval_answers_exact"] = share_exact(answers)
            self.log({"eval_answers_exact": metrics["eval_answers_exact"]})
            entry: dict[str, Any] = self.state.log_history[-1]
            entry["answers"] = answers
            for answer in answers:
                logger.info("step %d, row %s: %r, expected %r", self.state.global_step, *list(answer.values())[::2])
        self._since += time.perf_counter() - began  # evaluating is no training time
        return metrics

    # Checkpoints

    def _get_output_dir(self, trial: Any) -> str:
        return str(self._staging) if self._staging is not None else super()._get_output_dir(trial)

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        """Written in a folder of its own, then moved to its place in one step."""
        began = time.perf_counter()
        if nonfinite_tensors(self.model.named_parameters()):  # type: ignore[union-attr]
            self._stop("state", {})
        run, name = self.run, f"checkpoint-{self.state.global_step}"
        with self._writing(name) as folder:
            super()._save_checkpoint(model, trial)
            if self.args.should_save:
                self.loaded.processor.save_pretrained(folder)
        self.accelerator.wait_for_everyone()
        if self.args.should_save:
            publish(folder, run / name)
            for old in checkpoints(run)[: -self.keep_checkpoints]:
                remove(old, staging_folder(run))
        self.accelerator.wait_for_everyone()
        self._since += time.perf_counter() - began

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        model: Any = self.loaded.model
        if not is_sharded(model):
            super().save_model(output_dir, _internal_call)
            return
        state_dict = full_state_dict(model)
        if self.args.should_save:
            distributed, model.config.distributed_config = model.config.distributed_config, None
            model.save_pretrained(output_dir, state_dict=state_dict)
            model.config.distributed_config = distributed

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        if not is_sharded(self.loaded.model):
            super()._save_optimizer_and_scheduler(output_dir)
            return
        state = full_optimizer_state(self.loaded.model, self.optimizer)
        if self.args.should_save:
            torch.save(state, Path(output_dir) / OPTIMIZER_NAME)
            torch.save(self.lr_scheduler.state_dict(), Path(output_dir) / SCHEDULER_NAME)  # type: ignore[union-attr]

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if checkpoint is None or not is_sharded(self.loaded.model):
            super()._load_optimizer_and_scheduler(checkpoint)
            return
        folder = Path(checkpoint)
        state = torch.load(folder / OPTIMIZER_NAME, map_location="cpu", weights_only=True)
        load_optimizer_state(self.loaded.model, self.optimizer, state)
        self.lr_scheduler.load_state_dict(torch.load(folder / SCHEDULER_NAME, weights_only=True))  # type: ignore[union-attr]

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        if not is_sharded(self.loaded.model):  # a sharded one was loaded before it was split
            super()._load_from_checkpoint(resume_from_checkpoint, model)

    def _writing(self, name: str) -> "_Writing":
        return _Writing(self, name)


class _Writing:
    """While it lasts, the Trainer writes into the staging folder; what cannot be written there is deleted again."""

    def __init__(self, trainer: MoeLlavaTrainer, name: str):
        self.trainer, self.name = trainer, name
        self.run = trainer.run

    def __enter__(self) -> Path:
        self.trainer._staging = staging_folder(self.run)
        return self.trainer._staging / self.name

    def __exit__(self, kind: Any, error: BaseException | None, traceback: Any) -> None:
        self.trainer._staging = None
        if not isinstance(error, Exception) or isinstance(error, FloatingPointError):
            return
        shutil.rmtree(staging_folder(self.run) / self.name, ignore_errors=True)
        good = newest_checkpoint(self.run)
        raise OSError(
            f"{self.name} could not be written: {error}. The last good checkpoint is "
            f"{good.name if good else 'none'}, and it is untouched. Make room in {self.run} and start the recipe "
            "again; it goes on from there."
        ) from error


class _Progress(ProgressCallback):
    """transformers' bar; of each log entry it shows what a person reads, not a number per expert."""

    SHOWN = ("loss", "aux_loss", "learning_rate", "grad_norm", "tokens_per_second", "eval_loss", "eval_answers_exact")

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        if state.is_world_process_zero and self.training_bar is not None:
            shown = {name: f"{logs[name]:.4g}" for name in self.SHOWN if name in logs}
            if shown:
                words = "  ".join(f"{name} {value}" for name, value in shown.items())
                self.training_bar.write(f"step {state.global_step}  {words}")


def peak_memory_mib(device: torch.device) -> float:
    """Peak memory so far: of the accelerator's tensors, or of this process where there is none."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10  # Linux counts KiB
