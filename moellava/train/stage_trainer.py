"""What every stage's trainer does, whatever its loss: `StageTrainer`.

Rates of parts, answers to held-out questions, checkpoints that are whole or not there, and a stop
at the first non-finite gradient.
"""

import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import gather_object
from torch import Tensor, nn
from transformers import ProgressCallback, Trainer
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
from moellava.train.log.step_log import StepLog
from moellava.train.nonfinite import nonfinite_tensors
from moellava.train.rates import split_by_rate
from moellava.train.stage import LogEntry


class StageTrainer(Trainer):
    """transformers' `Trainer`, or one of TRL's that comes behind it, in a run's folder.

    A subclass calls `begin_stage` at the end of its constructor.
    """

    def begin_stage(
        self,
        *,
        loaded: LoadedModel,
        collator: ChatCollator,
        held_out_rows: Sequence[Row],
        num_rows: int,
        keep_checkpoints: int,
        num_answers: int,
        scorers: Sequence[str],
        max_new_tokens: int,
        rates: Mapping[str, float],
    ) -> None:
        """Set what the methods here look at.

        Args:
            loaded: the model with its processor.
            collator: writes the prompts of held-out questions.
            num_rows: to train on.
            keep_checkpoints: how many of the newest stay.
            num_answers: held-out rows whose first question is answered into the log.
            scorers: names of `moellava.eval` rules for the answers to all held-out questions.
            max_new_tokens: of an answer.
            rates: learning rates of parts, in place of the arguments' one.
        """
        self.is_sharded = sharding.is_sharded(loaded.model)
        # Leaves placing and gradients to FSDP2, as for a model that transformers has split. Set
        # after the Trainer's own checks, which refuse to save such a model; here it is saved whole.
        self.is_distributed_loading_by_transformers = self.is_sharded
        self.run = self._output_dir = Path(str(self.args.output_dir))
        self.loaded, self.collator = loaded, collator
        self.held_out_rows, self.num_rows = held_out_rows, num_rows
        self.keep_checkpoints = keep_checkpoints
        self.num_answers, self.max_new_tokens = num_answers, max_new_tokens
        self.scorers, self.rates = scorers, rates
        self.step_log = StepLog(loaded.model.config)
        self._row_ids: list[object] = []  # of the optimizer step at hand
        for callback in (ProgressCallback, PrinterCallback):
            self.remove_callback(callback)
        self.progress_bar = ProgressBar(scorers)
        if not self.args.disable_tqdm:
            self.add_callback(self.progress_bar)

    def close_progress_bar(self) -> None:
        """Leave the bar's line, also after an error."""
        self.progress_bar.close()

    # One step

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """As the Trainer's, with a rate for each part."""
        is_new = self.optimizer is None
        optimizer: torch.optim.Optimizer = super().create_optimizer(model)
        if is_new and self.rates:
            learning: Any = self.model if model is None else model
            split_by_rate(optimizer, learning.named_parameters(), self.rates)
        return optimizer

    def _get_grad_norm(self, model: nn.Module, grad_norm: Any = None) -> Any:
        norm = super()._get_grad_norm(model, grad_norm)  # type: ignore[no-untyped-call]
        if not bool(torch.as_tensor(norm).isfinite()):
            self.stop("gradient", self._row_ids, self.bad_weights() or self._bad_gradients())
        return norm

    def bad_weights(self) -> str:
        """What is wrong with the weights, in words; empty if all are finite."""
        names = nonfinite_tensors(self.loaded.model.named_parameters())
        return f"The weights {', '.join(names)} are not finite" if names else ""

    def _bad_gradients(self) -> str:
        names = nonfinite_tensors(
            (name, weight.grad) for name, weight in self.loaded.model.named_parameters()
        )
        return f"The gradients of {', '.join(names) or 'some weights'} are not finite"

    def stop(self, what: str, row_ids: Sequence[object], where: str) -> None:
        """Raise before a weight or a checkpoint is spoilt."""
        good = newest_checkpoint(self.run)
        raise FloatingPointError(
            f"The {what} of step {self.state.global_step + 1} is not finite. {where}. Rows of the "
            f"batch: {row_ids}. The last good checkpoint is {good.name if good else 'none'}; "
            "nothing was written after it. Look at these rows, or lower optim.learning_rate, and "
            "start the recipe again."
        )

    def sum_over_processes(self, tensor: Tensor) -> Tensor:
        """The same on every process."""
        summed: Tensor = self.accelerator.reduce(tensor, reduction="sum")
        return summed

    # Evaluation

    def log_answers(self) -> dict[str, float]:
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
        if where := self.bad_weights():
            self.stop("state", self._row_ids, where)
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
