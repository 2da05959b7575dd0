"""The table of stages: what each starts from, trains, does not look at, and how it plans and runs.

A new stage is a row here, and its test; `docs/add_a_training_stage.md` has an example.
"""

from moellava.train.gradient_steps import train_by_gradient
from moellava.train.plan import plan_gradient_steps
from moellava.train.reward_stage import plan_reward, train_reward
from moellava.train.router_stage import plan_router, train_router
from moellava.train.stage import STAGES, Stage, register_stage

__all__ = ["STAGES"]

for row in (
    Stage(
        name="align",
        recipe="stage1_align",
        after=None,
        trainable=("projector",),
        unused=("moe", "reward"),
        run=train_by_gradient,
        plan=plan_gradient_steps,
    ),
    Stage(
        name="tune",
        recipe="stage2_tune",
        after="align",
        trainable=("language_model", "projector"),
        unused=("moe", "reward"),
        run=train_by_gradient,
        plan=plan_gradient_steps,
    ),
    Stage(
        name="router",
        recipe="med_moe_router",
        after="tune",
        trainable=(),
        unused=(
            "lora",
            "reward",
            "trainable",
            "tower_blocks",
            "trainer",
            "data.packing",
            "data.features",
            "optim.max_steps",
            "optim.rates",
            "evaluation.scorers",
        ),
        gives_router=True,
        run=train_router,
        plan=plan_router,
    ),
    Stage(
        name="experts",
        recipe="stage3_experts",
        after="tune",
        trainable=("experts", "router"),
        unused=("reward",),
        makes_mixture=True,
        dense_stage="tune",
        run=train_by_gradient,
        plan=plan_gradient_steps,
    ),
    Stage(
        name="reward",
        recipe="stage4_reward",
        after="experts",
        trainable=("experts", "router"),
        unused=(
            "moe",
            "parallel",
            "data.packing",
            "data.features",
            "data.max_length",
            "data.long_rows",
            "data.group_by_length",
        ),
        run=train_reward,
        plan=plan_reward,
    ),
):
    register_stage(row)
