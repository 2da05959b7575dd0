"""Supervised training of a mixture on medical data: `MoeLlavaTrainer`.

Logs of the routers, and a stop at the first non-finite loss, beside what `StageTrainer` has.
"""

import time
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn
from transformers import TrainingArguments

from moellava.data.collate import ChatCollator
from moellava.data.rows import Row
from moellava.model.loaded_model import LoadedModel
from moellava.train import sharding
from moellava.train.log.router_load import load_by_name
from moellava.train.nonfinite import first_nonfinite_module
from moellava.train.order import EpochSampler
from moellava.train.stage import LogEntry
from moellava.train.stage_trainer import StageTrainer


class MoeLlavaTrainer(StageTrainer):
    """Trains one stage on the answers of its rows.

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
        if self.is_fsdp_enabled:
            self.accelerator.state.fsdp_plugin.transformer_cls_names_to_wrap = [
                sharding.decoder_layer_class(loaded.model)
            ]
        self.begin_stage(
            loaded=loaded,
            collator=collator,
            held_out_rows=evaluation_rows or (),
            num_rows=len(train_rows),
            keep_checkpoints=keep_checkpoints,
            num_answers=num_answers,
            scorers=scorers,
            max_new_tokens=max_new_tokens,
            rates=rates,
        )
        tower = loaded.model.model.vision_tower
        self.frozen_tower = (
            None if any(weight.requires_grad for weight in tower.parameters()) else tower
        )
        self._lacks_images = False
        self._image_part: Tensor
        sees = (tower, loaded.model.model.multi_modal_projector)
        if any(weight.requires_grad for module in sees for weight in module.parameters()):
            embedding = loaded.model.get_input_embeddings()
            embedding.register_forward_pre_hook(self._prepare_image_part)
            embedding.register_forward_hook(self._add_image_part)
        self.sampler = EpochSampler(
            len(train_rows),
            seed=arguments.seed if arguments.data_seed is None else arguments.data_seed,
            lengths=lengths,
            group_size=arguments.train_batch_size
            * arguments.gradient_accumulation_steps
            * arguments.world_size,
        )

    # Data

    def _get_train_sampler(self, train_dataset: object = None) -> EpochSampler:
        return self.sampler

    def _run_epoch(self, *args: Any, **kwargs: Any) -> None:
        # accelerate's loaders do not reach the sampler through all of their wrappers.
        self.sampler.epoch = kwargs["epoch"]
        super()._run_epoch(*args, **kwargs)  # type: ignore[no-untyped-call]

    # One step

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
            self.stop("loss", row_ids, self.bad_weights() or self._where_it_began(inputs))
        if model.training:
            self.step_log.add(inputs, outputs)
        if self.step_log.is_mixture:
            outputs.router_logits = None  # evaluation would gather them
        return (loss, outputs) if return_outputs else loss

    def _where_it_began(self, inputs: Mapping[str, object]) -> str:
        if self.is_sharded or self.is_fsdp_enabled or self.is_deepspeed_enabled:
            return "Where it began cannot be found in a sharded model"
        inputs = {name: value for name, value in inputs.items() if name != "num_items_in_batch"}
        first = first_nonfinite_module(self.loaded.model, inputs)
        if first is None:
            return "The outputs are finite"
        return f"The first output that is not finite is that of {first}"

    # Batches without an image

    def _prepare_image_part(self, _module: nn.Module, _ids: object) -> None:
        """What sees images, run for nothing in a batch that has none.

        It would have no gradient otherwise. Stage 1 would have nothing to learn from such a batch,
        and processes that wait for the gradients of one another (DDP, FSDP2) would wait for ever.
        Run inside the model's forward pass, in which FSDP2 has the projector's weights whole; and
        before the embedding, where images are encoded: DeepSpeed's ZeRO-2 adds up gradients in the
        order in which they come, which has to be that of processes with images.
        """
        if not self._lacks_images:
            return
        base, processor = self.loaded.model, self.loaded.processor
        height, width = base.config.vision_config.image_hw
        inputs = processor.image_inputs([Image.new("RGB", (width, height))])
        inputs = {name: value.to(base.device) for name, value in inputs.items()}
        self._image_part = 0 * base.model.get_image_features(**inputs).pooler_output[0].sum()

    def _add_image_part(
        self, _module: nn.Module, _ids: object, embeddings: Tensor
    ) -> Tensor | None:
        if not self._lacks_images:
            return None
        return embeddings + self._image_part.to(embeddings.dtype)

    # Logs

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """As the Trainer's; a step's entry also has what `StepLog` counts.

        In the log history, `load` is what `RouterLoad.flush` gives; TensorBoard and its like get
        one number for each expert.
        """
        if "loss" not in logs:
            super().log(logs, start_time)
            return
        numbers, load = self.step_log.flush(self.args.device, self.sum_over_processes)
        flat = load_by_name(load)
        super().log({**logs, **numbers, **flat}, start_time)
        entry: LogEntry = self.state.log_history[-1]
        for name in flat:
            del entry[name]
        if load is not None:
            entry["load"] = load

    # Evaluation

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        """As the Trainer's, with answers to held-out questions and their scores.

        Random numbers stay as they were.
        """
        began = time.perf_counter()
        with torch.random.fork_rng([self.args.device] if self.args.device.type == "cuda" else []):
            metrics: dict[str, float] = super().evaluate(*args, **kwargs)
            if self.num_answers or self.scorers:
                metrics |= self.log_answers()
        self.step_log.leave_out(time.perf_counter() - began)
        return metrics
