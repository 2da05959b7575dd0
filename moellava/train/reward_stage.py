"""Stage `reward`: reinforcement learning from answers that a scorer can check, by TRL's GRPO.

| name | what it does |
|---|---|
| `train_reward` | trains the stage in the run's folder |
| `plan_reward` | counts and estimates |
"""

import logging
import math
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, cast

from moellava.eval.questions import questions_of
from moellava.eval.scorers import find_scorers
from moellava.model.loaded_model import LoadedModel
from moellava.train.batches import build_collator, read_data
from moellava.train.gradient_steps import resumable_checkpoint, run_stage
from moellava.train.options import Recipe
from moellava.train.plan import PlannedRows, describe_costs, list_trained
from moellava.train.prepare import build_model, prepare_model
from moellava.train.run_folder import run_folder
from moellava.train.stage import Plan, TrainResult

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel

logger = logging.getLogger(__name__)


def train_reward(recipe: Recipe, run: Path, show_progress: bool) -> TrainResult:
    """Train from the newest checkpoint if there is one.

    Raises:
        ImportError: without TRL.
        ValueError: if the answers of a step are not whole groups.
    """
    _require(recipe)
    from trl.trainer.grpo_config import GRPOConfig

    from moellava.train.arguments import arguments_of, read_whole
    from moellava.train.reward_trainer import RewardTrainer

    checkpoint = resumable_checkpoint(run)
    reward = recipe.reward
    arguments = arguments_of(
        GRPOConfig,
        recipe,
        show_progress=show_progress,
        resumes=checkpoint is not None,
        more={
            "num_generations": reward.num_answers,
            "num_generations_eval": 1,
            "max_completion_length": reward.max_new_tokens,
            "temperature": reward.temperature,
            "beta": 0.0,  # the trainer sets it: TRL cannot read the start again
        },
    )
    data = read_data(recipe, show_progress=show_progress and arguments.process_index == 0)
    needs_start = reward.kl > 0 and recipe.lora is None
    with read_whole(arguments):
        model, loaded = prepare_model(recipe)
        _require_one_view(loaded)
        start = build_model(recipe).model if needs_start else None
    trainer = RewardTrainer(
        cast("PreTrainedModel | PeftModel", model),
        arguments,
        reward,
        loaded=loaded,
        start=start,
        collator=build_collator(recipe, loaded.processor),
        train_rows=data.train,
        held_out_rows=data.evaluation or (),
        keep_checkpoints=recipe.saving.keep,
        num_answers=recipe.evaluation.num_answers if data.evaluation is not None else 0,
        scorers=recipe.evaluation.scorers,
        max_new_tokens=recipe.evaluation.max_new_tokens,
        rates=recipe.optim.rates,
    )
    return run_stage(recipe, trainer, checkpoint)


def plan_reward(recipe: Recipe) -> Plan:
    """Memory is that of a batch of the longest rows, and of the start beside the model."""
    _require(recipe)
    run_folder(recipe)
    model, loaded = prepare_model(recipe, on_meta=True)
    _require_one_view(loaded)
    rows = PlannedRows.of(recipe, loaded)
    data, optim, reward = read_data(recipe), recipe.optim, recipe.reward
    num_answers = sum(1 for _ in questions_of(data.train)) * reward.num_answers
    num_steps = optim.max_steps or math.ceil(num_answers / optim.batch_size * optim.epochs)
    memory, flops = rows.costs(model, recipe, num_rows=num_steps * optim.batch_size)
    total = sum(weight.numel() for weight in model.parameters())
    trained = sum(weight.numel() for weight in model.parameters() if weight.requires_grad)
    lines = [
        f"stage reward: trains {trained:,} of {total:,} parameters ({100 * trained / total:.2f} %)",
        *(f"  {line}" for line in list_trained(model)),
        rows.text(),
        f"steps {num_steps:,} of {optim.batch_size} answers, {reward.num_answers} to a question of "
        f"at most {reward.max_new_tokens} tokens; rewards: {', '.join(reward.scorers)}",
        *describe_costs(memory, flops),
        "the time to draw answers, and the start's own weights, are not in it",
    ]
    return Plan(trained, total, len(rows.lengths), num_steps, memory, flops, "\n".join(lines))


def _require(recipe: Recipe) -> None:
    if find_spec("trl") is None:
        raise ImportError(
            "Stage 'reward' needs TRL, which is not installed. Type: pip install 'moellava[rl]'"
        )
    find_scorers(recipe.reward.scorers)
    answers, batch = recipe.reward.num_answers, recipe.optim.batch_size
    if batch % answers:
        raise ValueError(
            f"optim.batch_size={batch} answers are not whole groups of "
            f"reward.num_answers={answers}. Choose a multiple."
        )


def _require_one_view(loaded: LoadedModel) -> None:
    if loaded.processor.tiling is not None:
        raise ValueError(
            "Stage 'reward' takes one view of each image: TRL divides a batch's pixel values by "
            "images, and this model's tiling makes several views of one. Start from a model "
            "without tiling."
        )
