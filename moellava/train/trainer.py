"""transformers' `Trainer` with what training a mixture on medical data needs: `MoeLlavaTrainer`.

Logs of the routers, answers to held-out questions, checkpoints that are whole or not there, and a
stop at the first non-finite loss or gradient.
"""

import logging
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from accelerate.utils import gather_object
from torch import Tensor, nn
from transformers import ProgressCallback, Trainer, TrainingArguments
from transformers.trainer import OPTIMIZER_NAME, SCHEDULER_NAME, TRAINING_ARGS_NAME
from transformers.trainer_callback import PrinterCallback

from moellava.data.collate import ChatCollator
from moellava.data.rows import Row
from moellava.eval.predictions import Prediction
from moellava.eval.questions import Question, questions_of
from moellava.model.checkpoint.adapter import name_base
from moellava.model.loaded_model import LoadedModel
from moellava.storage.errors import reading
from moellava.train import sharding
from moellava.train.answers import (
    answer_questions,
    first_questions,
    mean_scores,
    share_exact,
)
from moellava.train.checkpoints import (
    checkpoints,
    newest_checkpoint,
    publish,
    remove,
    staging_folder,
    writing,
)
from moellava.train.log.progress import ProgressBar
from moellava.train.log.router_load import load_by_name
from moellava.train.log.step_log import StepLog
from moellava.train.nonfinite import first_nonfinite_module, nonfinite_tensors
from moellava.train.order import EpochSampler
from moellava.train.rates import split_by_rate
from moellava.train.stage import LogEntry

logger = logging.getLogger(__name__)


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
        num_answers: held-out rows whose first question is answered into the log.
        scorers: names of `moellava.eval` rules for the answers to all held-out questions.
        max_new_tokens: of an answer.
        rates: learning rates of parts, in place of the arguments' one.
    """

    def __init__(
        self,
        model: nn.Module,
        arguments: TrainingArguments,
        *,
        loaded: LoadedModel,
        collator: ChatCollator,
        train_rows: Sequence[Row],
        evaluation_rows: Sequence[Row] | None = None,
        lengths: Sequence[int] | None = None,
        keep_checkpoints: int = 2,
        num_answers: int = 0,
        scorers: Sequence[str] = (),
        max_new_tokens: int = 32,
        rates: Mapping[str, float] = MappingProxyType({}),
    ) -> None:
        super().__init__(
            model=model,
            args=arguments,
            data_collator=collator,
            train_dataset=train_rows,
            eval_dataset=evaluation_rows,
        )
        self.is_sharded = sharding.is_sharded(loaded.model)
        # Leaves placing and gradients to FSDP2, as for a model that transformers has split. Set
        # after the Trainer's own checks, which refuse to save such a model; here it is saved whole.
        self.is_distributed_loading_by_transformers = self.is_sharded
        if self.is_fsdp_enabled:
            self.accelerator.state.fsdp_plugin.transformer_cls_names_to_wrap = [
                sharding.decoder_layer_class(loaded.model)
            ]
        self.run = Path(str(arguments.output_dir))
        self.loaded, self.collator = loaded, collator
        self.held_out_rows = evaluation_rows or ()
        self.keep_checkpoints = keep_checkpoints
        self.num_answers, self.max_new_tokens = num_answers, max_new_tokens
        self.scorers = scorers
        self.rates = rates
        tower = loaded.model.model.vision_tower
        self.frozen_tower = (
            None if any(weight.requires_grad for weight in tower.parameters()) else tower
        )
        self._lacks_images = False
        sees = (tower, loaded.model.model.multi_modal_projector)
        if any(weight.requires_grad for module in sees for weight in module.parameters()):
            embedding = loaded.model.get_input_embeddings()
            embedding.register_forward_hook(self._add_image_part)
        self.step_log = StepLog(loaded.model.config)
        self.sampler = EpochSampler(
            len(train_rows),
            seed=arguments.seed if arguments.data_seed is None else arguments.data_seed,
            lengths=lengths,
            group_size=arguments.train_batch_size
            * arguments.gradient_accumulation_steps
            * arguments.world_size,
        )
        self._row_ids: list[object] = []  # of the optimizer step at hand
        self._output_dir = self.run
        for callback in (ProgressCallback, PrinterCallback):
            self.remove_callback(callback)
        self.progress_bar = ProgressBar(scorers)
        if not arguments.disable_tqdm:
            self.add_callback(self.progress_bar)

    def close_progress_bar(self) -> None:
        """Leave the bar's line, also after an error."""
        self.progress_bar.close()

    # Data

    def _get_train_sampler(self, train_dataset: object = None) -> EpochSampler:
        return self.sampler

    def _run_epoch(self, *args: Any, **kwargs: Any) -> None:
        # accelerate's loaders do not reach the sampler through all of their wrappers.
        self.sampler.epoch = kwargs["epoch"]
        super()._run_epoch(*args, **kwargs)  # type: ignore[no-untyped-call]

    # One step

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """As the Trainer's, with a rate for each part."""
        is_new = self.optimizer is None
        optimizer: torch.optim.Optimizer = super().create_optimizer(model)
        if is_new and self.rates:
            learning: Any = self.model if model is None else model
            split_by_rate(optimizer, learning.named_parameters(), self.rates)
        return optimizer

    def get_batch_samples(self, *args: Any, **kwargs: Any) -> Any:
        self._row_ids = []
        return super().get_batch_samples(*args, **kwargs)

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Any = None,
    ) -> Any:
        inputs = dict(inputs)
        row_ids = inputs.pop("row_ids", [])
        if model.training:
            self._row_ids += row_ids
        if self.frozen_tower is not None:
            # Running statistics and dropout of a frozen tower stay as they are.
            self.frozen_tower.train(False)
        self._lacks_images = model.training and not {"pixel_values", "patch_tokens"} & set(inputs)
        inputs["use_cache"] = False
        if self.step_log.is_mixture:
            inputs["output_router_logits"] = True
        loss, outputs = super().compute_loss(
            model, inputs, return_outputs=True, num_items_in_batch=num_items_in_batch
        )
        if not bool(loss.isfinite()):
            self._stop("loss", row_ids, self._bad_weights() or self._where_it_began(inputs))
        if model.training:
            self.step_log.add(inputs, outputs)
        if self.step_log.is_mixture:
            outputs.router_logits = None  # evaluation would gather them
        return (loss, outputs) if return_outputs else loss

    def _get_grad_norm(self, model: nn.Module, grad_norm: Any = None) -> Any:
        norm = super()._get_grad_norm(model, grad_norm)  # type: ignore[no-untyped-call]
        if not bool(torch.as_tensor(norm).isfinite()):
            self._stop("gradient", self._row_ids, self._bad_weights() or self._bad_gradients())
        return norm

    def _bad_weights(self) -> str:
        names = nonfinite_tensors(self.loaded.model.named_parameters())
        return f"The weights {', '.join(names)} are not finite" if names else ""

    def _bad_gradients(self) -> str:
        names = nonfinite_tensors(
            (name, weight.grad) for name, weight in self.loaded.model.named_parameters()
        )
        return f"The gradients of {', '.join(names) or 'some weights'} are not finite"

    def _where_it_began(self, inputs: Mapping[str, object]) -> str:
        if self.is_sharded or self.is_fsdp_enabled or self.is_deepspeed_enabled:
            return "Where it began cannot be found in a sharded model"
        inputs = {name: value for name, value in inputs.items() if name != "num_items_in_batch"}
        first = first_nonfinite_module(self.loaded.model, inputs)
        if first is None:
            return "The outputs are finite"
        return f"The first output that is not finite is that of {first}"

    def _stop(self, what: str, row_ids: Sequence[object], where: str) -> None:
        """Raise before a weight or a checkpoint is spoilt."""
        good = newest_checkpoint(self.run)
        raise FloatingPointError(
            f"The {what} of step {self.state.global_step + 1} is not finite. {where}. Rows of the "
            f"batch: {row_ids}. The last good checkpoint is {good.name if good else 'none'}; "
            "nothing was written after it. Look at these rows, or lower optim.learning_rate, and "
            "start the recipe again."
        )

    # Batches without an image

    def _add_image_part(
        self, _module: nn.Module, _ids: object, embeddings: Tensor
    ) -> Tensor | None:
        """Give what sees images a gradient of zero in a batch that has none.

        Stage 1 would have nothing to learn from it, and processes that wait for the gradients of
        one another (DDP, FSDP2) would wait for ever. Added inside the model's forward pass, in
        which FSDP2 has the projector's weights whole.
        """
        if not self._lacks_images:
            return None
        base = self.loaded.model
        height, width = base.config.vision_config.image_hw
        pixels = torch.zeros(1, 3, height, width, device=embeddings.device)
        image: Tensor = base.model.get_image_features(pixels).pooler_output[0]
        return embeddings + 0 * image.sum().to(embeddings.dtype)

    # Logs

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """As the Trainer's; a step's entry also has what `StepLog` counts.

        In the log history, `load` is what `RouterLoad.flush` gives; TensorBoard and its like get
        one number for each expert.
        """
        if "loss" not in logs:
            super().log(logs, start_time)
            return
        numbers, load = self.step_log.flush(self.args.device, self._sum)
        flat = load_by_name(load)
        super().log({**logs, **numbers, **flat}, start_time)
        entry: LogEntry = self.state.log_history[-1]
        for name in flat:
            del entry[name]
        if load is not None:
            entry["load"] = load

    def _sum(self, tensor: Tensor) -> Tensor:
        summed: Tensor = self.accelerator.reduce(tensor, reduction="sum")
        return summed

    # Evaluation

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        """As the Trainer's, with answers to held-out questions and their scores.

        Random numbers stay as they were.
        """
        began = time.perf_counter()
        with torch.random.fork_rng([self.args.device] if self.args.device.type == "cuda" else []):
            metrics: dict[str, float] = super().evaluate(*args, **kwargs)
            if self.num_answers or self.scorers:
                metrics |= self._log_answers()
        self.step_log.leave_out(time.perf_counter() - began)
        return metrics

    def _log_answers(self) -> dict[str, float]:
        """Answer held-out questions, score them, and log both."""
        rows = self.held_out_rows
        questions = list(questions_of(rows))
        shown = first_questions(questions, self.num_answers)
        answered = self._answer(questions if self.scorers else shown)
        answers = [answered[question.id] for question in shown]
        metrics = {"eval_answers_exact": share_exact(answers)} if answers else {}
        if self.scorers:
            scores = mean_scores(list(answered.values()), self.scorers)
            metrics |= {f"eval_{name}": value for name, value in scores.items()}
        self.log(dict(metrics))
        entry: LogEntry = self.state.log_history[-1]
        keys = ("id", "question", "answer", "truth")
        entry["answers"] = [{key: getattr(one, key) for key in keys} for one in answers]
        return metrics

    def _answer(self, questions: Sequence[Question]) -> dict[str, Prediction]:
        """The answers by id, on every process.

        Each process answers its share, unless a model is split over them: then all have to compute
        every answer together.
        """
        together = self.is_sharded or self.is_fsdp_enabled or self.is_deepspeed_enabled
        first, step = (0, 1) if together else (self.args.process_index, self.args.world_size)
        predictions = answer_questions(
            self.loaded,
            self.held_out_rows,
            questions[first::step],
            self.collator,
            max_new_tokens=self.max_new_tokens,
            batch_size=self.args.eval_batch_size,
        )
        if step > 1:
            predictions = gather_object(predictions)
        answered = {one.id: one for one in predictions}
        return {question.id: answered[question.id] for question in questions}

    # Checkpoints

    def _get_output_dir(self, trial: object) -> str:
        return str(self._output_dir)

    def _save_checkpoint(self, model: nn.Module, trial: object) -> None:
        """Written in a folder of its own, then moved to its place in one step."""
        began = time.perf_counter()
        if where := self._bad_weights():
            self._stop("state", self._row_ids, where)
        name = f"checkpoint-{self.state.global_step}"
        with writing(self.run, name) as folder:
            self._output_dir = folder.parent
            try:
                super()._save_checkpoint(model, trial)
            finally:
                self._output_dir = self.run
            self.accelerator.wait_for_everyone()  # each process writes its random numbers
            if self.args.should_save:
                self.loaded.processor.save_pretrained(folder)
                publish(folder, self.run / name)
        if self.args.should_save:
            for old in checkpoints(self.run)[: -self.keep_checkpoints]:
                remove(old, staging_folder(self.run))
        self.accelerator.wait_for_everyone()
        self.step_log.leave_out(time.perf_counter() - began)

    def load_checkpoint(self, checkpoint: Path) -> None:
        """Load the weights of a checkpoint, and nothing else."""
        self._load_from_checkpoint(str(checkpoint))

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """As the Trainer's, with whole weights if the model is sharded."""
        if self.is_sharded:
            sharding.save_model(
                self.model,
                self.loaded.model,
                Path(str(output_dir)),
                should_save=self.args.should_save,
            )
        else:
            super().save_model(output_dir, _internal_call)
        if self.args.should_save:
            # A pickle with paths of this machine, and the tokens that `trainer` may hold.
            (Path(str(output_dir)) / TRAINING_ARGS_NAME).unlink(missing_ok=True)
            name_base(Path(str(output_dir)), self.loaded.model.config.language_model)

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        if not self.is_sharded:
            super()._save_optimizer_and_scheduler(output_dir)
            return
        assert self.model is not None
        assert self.optimizer is not None  # made before the first step
        state = sharding.full_optimizer_state(self.model, self.optimizer)
        if self.args.should_save:
            scheduler: Any = self.lr_scheduler
            torch.save(state, Path(output_dir) / OPTIMIZER_NAME)
            torch.save(scheduler.state_dict(), Path(output_dir) / SCHEDULER_NAME)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        with reading(checkpoint or self.run, "an optimizer's state"):
            self._load_states(checkpoint)

    def _load_states(self, checkpoint: str | None) -> None:
        if checkpoint is None or not self.is_sharded:
            super()._load_optimizer_and_scheduler(checkpoint)
            return
        scheduler: Any = self.lr_scheduler
        state = torch.load(Path(checkpoint) / OPTIMIZER_NAME, map_location="cpu", weights_only=True)
        assert self.model is not None
        assert self.optimizer is not None
        sharding.load_optimizer_state(self.model, self.optimizer, state)
        scheduler.load_state_dict(torch.load(Path(checkpoint) / SCHEDULER_NAME, weights_only=True))

    def _load_from_checkpoint(
        self, resume_from_checkpoint: str, model: nn.Module | None = None
    ) -> None:
        if not self.is_sharded:  # a sharded one was loaded before it was split
            with reading(resume_from_checkpoint, "a checkpoint"):
                super()._load_from_checkpoint(resume_from_checkpoint, model)

    def _load_rng_state(self, checkpoint: str | None) -> None:
        with reading(checkpoint or self.run, "random states"):
            super()._load_rng_state(checkpoint)
