"""TRL's GRPO in a run's folder: `RewardTrainer`. Imported only where TRL is installed."""

import copy
import time
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from datasets import Dataset
from torch import nn
from transformers import Trainer
from trl.trainer.grpo_config import GRPOConfig
from trl.trainer.grpo_trainer import GRPOTrainer
from trl.trainer.utils import add_fused_lm_head

from moellava.data.collate import ChatCollator
from moellava.data.rows import Row
from moellava.eval.rewards import format_reward, scorer_reward
from moellava.model.language_model.configuration_llama_moe import is_mixture_config
from moellava.model.loaded_model import LoadedModel
from moellava.model.modeling_moellava import MoeLlavaForConditionalGeneration
from moellava.train.log.router_load import RouterLoad, load_by_name
from moellava.train.options import Reward
from moellava.train.reward_rows import PromptRows
from moellava.train.router_loss import use_router_loss
from moellava.train.stage import LogEntry
from moellava.train.stage_trainer import StageTrainer

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel


class RewardTrainer(StageTrainer, GRPOTrainer):
    """Trains one stage on the rewards of answers that the model gives.

    The loss is TRL's, with the model's own router losses; held-out questions are answered greedily
    and scored as in every stage.

    Args:
        model: to train; `loaded.model` itself or a PEFT model around it.
        loaded: the model with its processor.
        start: the model as it was, for the divergence from it; None with adapters, which TRL
            switches off, or without that divergence.
        collator: its chat template writes the prompts.
        held_out_rows: are answered into the log.
        options: of `StageTrainer.begin_stage`.
    """

    def __init__(
        self,
        model: "PreTrainedModel | PeftModel",
        arguments: GRPOConfig,
        reward: Reward,
        *,
        loaded: LoadedModel,
        start: MoeLlavaForConditionalGeneration | None,
        collator: ChatCollator,
        train_rows: Sequence[Row],
        held_out_rows: Sequence[Row],
        **options: Any,
    ) -> None:
        prompts = PromptRows(train_rows, collator.load_image)
        numbers = Dataset.from_dict({"number": range(len(prompts))})
        processor = copy.copy(loaded.processor)
        processor.chat_template = collator.chat_template
        rewards: list[Any] = [scorer_reward(name) for name in reward.scorers]
        super().__init__(
            model=model,
            args=arguments,
            reward_funcs=rewards + [format_reward] * reward.format,
            train_dataset=numbers.with_transform(prompts.batch),
            eval_dataset=numbers if arguments.eval_strategy != "no" else None,
            processing_class=processor,
        )
        # TRL itself would look for the start's class in transformers.
        self.beta = reward.kl
        if start is not None:
            add_fused_lm_head(start, temperature=self.temperature)
            start.requires_grad_(False)
            self.ref_model = self.accelerator.prepare_model(start, evaluation_mode=True)
        self.begin_stage(
            loaded=loaded,
            collator=collator,
            held_out_rows=held_out_rows,
            num_rows=len(train_rows),
            **options,
        )
        self._count_load()

    def _count_load(self) -> None:
        config = self.loaded.model.config.text_config
        self.router_load: RouterLoad | None = None
        if not is_mixture_config(config):
            return
        if config.router_aux_loss_coef:
            use_router_loss(self)
        load = RouterLoad(config.num_experts_per_tok, config.moe_layer_indices)
        image_token = self.loaded.model.config.image_token_id

        def ask(
            _module: nn.Module, args: tuple[object, ...], given: dict[str, Any]
        ) -> tuple[tuple[object, ...], dict[str, Any]]:
            return args, {**given, "output_router_logits": True}

        def count(
            _module: nn.Module, _args: object, given: Mapping[str, Any], outputs: Any
        ) -> None:
            if torch.is_grad_enabled() and outputs.router_logits:  # not while answers are drawn
                is_image = given["input_ids"] == image_token
                load.add(outputs.router_logits, is_image, given.get("attention_mask"))

        self.loaded.model.model.register_forward_pre_hook(ask, with_kwargs=True)
        self.loaded.model.model.register_forward_hook(count, with_kwargs=True)
        self.router_load = load

    def create_model_card(self, *args: object, **kwargs: object) -> None:
        """Nothing: TRL's card would stand in the run's folder; the saved model has its own."""

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """As TRL's: rewards, lengths, divergence; and `load`, what `RouterLoad.flush` gives."""
        if "loss" not in logs:
            Trainer.log(self, logs, start_time)  # scores of held-out answers
            return
        load = None if self.router_load is None else self.router_load.flush(self.sum_over_processes)
        flat = load_by_name(load)
        super().log({**logs, **flat}, start_time)
        entry: LogEntry = self.state.log_history[-1]
        for name in [name for name, value in entry.items() if name in flat or value is None]:
            del entry[name]
        if load is not None:
            entry["load"] = load

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        """Answers to held-out questions and their scores; random numbers stay as they were."""
        began = time.perf_counter()
        with torch.random.fork_rng([self.args.device] if self.args.device.type == "cuda" else []):
            metrics: dict[str, float] = {}
            if self.num_answers or self.scorers:
                metrics = self.log_answers()
        self.step_log.leave_out(time.perf_counter() - began)
        self.control = self.callback_handler.on_evaluate(
            self.args, self.state, self.control, metrics
        )
        return metrics
