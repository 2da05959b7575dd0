"""Stage `router`: Med-MoE's router is fitted to a tuned model's hidden states, in one process.

| name | what it does |
|---|---|
| `train_router` | fits the router and saves it in the run's folder |
| `plan_router` | counts and estimates |
"""

import math
from pathlib import Path

from moellava.model.language_model import moe_config_from_dense
from moellava.train.batches import read_data
from moellava.train.checkpoints import clear_staging, publish, writing
from moellava.train.log.history import write_history
from moellava.train.options import Recipe
from moellava.train.plan import PlannedRows, describe_costs, layer_ranges
from moellava.train.prepare import outline_model
from moellava.train.router_fit import fit_router, save_router
from moellava.train.run_folder import MODEL_FOLDER, begin_run, run_folder, write_log
from moellava.train.stage import Plan, TrainResult
from moellava.train.start import find_start


def train_router(recipe: Recipe, run: Path, show_progress: bool) -> TrainResult:
    """Fit and save; without checkpoints, since it takes one forward pass over the rows."""
    data = read_data(recipe)
    router, labels, log = fit_router(recipe, data, show_progress=show_progress)
    begin_run(recipe, run)
    with writing(run, MODEL_FOLDER) as folder:
        folder.mkdir(parents=True)
        save_router(router, labels, folder)
        write_history(
            folder, find_start(recipe), stage=recipe.stage, rows=len(data.train), seed=recipe.seed
        )
        write_log(log, run)
        publish(folder, run / MODEL_FOLDER)
    clear_staging(run)
    return TrainResult(run / MODEL_FOLDER, log)


def plan_router(recipe: Recipe) -> Plan:
    """One forward pass over the rows, then a linear layer is fitted to what it gave."""
    run_folder(recipe)
    loaded = outline_model(recipe)
    loaded.model.requires_grad_(False)
    rows = PlannedRows.of(recipe, loaded)
    optim = recipe.optim
    mixture = moe_config_from_dense(loaded.model.config.text_config, **recipe.moe.config)
    total = sum(weight.numel() for weight in loaded.model.parameters())
    trained = mixture.num_experts * (mixture.hidden_size + 1)
    epochs = math.ceil(optim.epochs)
    num_steps = epochs * math.ceil(len(rows.lengths) / optim.batch_size)
    memory, flops = rows.costs(loaded.model, recipe, num_rows=len(rows.lengths))
    lines = [
        f"stage router: trains {trained:,} parameters; the model's {total:,} stay as they are",
        f"  router.weight ({mixture.num_experts}, {mixture.hidden_size}), "
        f"router.bias ({mixture.num_experts},), for layers "
        f"{layer_ranges(mixture.moe_layer_indices)}",
        rows.text(),
        f"one pass of the model, then {num_steps:,} steps of {optim.batch_size} rows by Adam, rate "
        f"{optim.learning_rate:g}, {epochs} passes over its hidden states",
        *describe_costs(memory, flops),
    ]
    return Plan(trained, total, len(rows.lengths), num_steps, memory, flops, "\n".join(lines))
