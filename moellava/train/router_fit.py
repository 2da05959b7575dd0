"""Med-MoE's router: one linear layer from a tuned model's hidden states to the modality of the image.

The router's logits are averaged over a row's tokens and the sparse layers (arXiv 2404.10237, section 3.2). A linear
layer of a mean is the mean of the linear layer, so each row's hidden states are averaged once and the fit is cheap.

Public name: `fit_router`.
"""

import json
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
import yaml
from safetensors.torch import save_file
from torch import Tensor, nn
from tqdm.auto import tqdm

import moellava
from moellava.data.collate import ChatCollator
from moellava.data.images import load_image
from moellava.model.language_model import moe_config_from_dense
from moellava.train.checkpoints import clear_staging, publish, staging_folder
from moellava.train.recipe import Recipe, recipe_to_dict
from moellava.train.stages import MODEL_FOLDER, ROUTER_FILE, build_model, read_history, write_history

logger = logging.getLogger(__name__)

LABEL_KEY = "modality"
LABELS_FILE = "labels.json"  # expert number to label


def fit_router(recipe: Recipe, *, show_progress: bool = True) -> Path:
    """Fit the router and write it to `output_dir/model`.

    Returns:
        That folder: `router.safetensors` with `weight` (E, H) and `bias` (E,), and `labels.json`.

    Raises:
        ValueError: if a row has no `modality`, or there are not as many modalities as experts.
    """
    from moellava.train.run import LOG_FILE, RECIPE_FILE, read_data, run_folder

    data = read_data(recipe)
    names = [_label(row) for row in data.train]
    labels = sorted(set(names))
    loaded = build_model(recipe)
    mixture = moe_config_from_dense(loaded.model.config.text_config, **recipe.moe.config)
    if len(labels) != mixture.num_experts:
        raise ValueError(
            f"The rows have {len(labels)} modalities ({', '.join(labels)}), but moe.config.num_experts is "
            f"{mixture.num_experts}. Each expert serves one: set moe.config.num_experts={len(labels)}."
        )
    collator = ChatCollator(
        loaded.processor,
        chat_template=recipe.data.chat_template,
        max_length=recipe.data.max_length,
        long_rows=recipe.data.long_rows,
        load_image=load_image,
    )
    device = torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")
    loaded.model.to(device)  # type: ignore[arg-type]

    def features(rows: Sequence[Any]) -> Tensor:
        return mean_hidden_states(
            loaded.model, rows, collator, mixture.moe_layer_indices, recipe.optim.per_device_batch_size, show_progress
        )

    targets = torch.tensor([labels.index(name) for name in names])
    router = fit_linear(features(data.train), targets, len(labels), recipe)
    log: list[dict[str, Any]] = []
    if data.evaluation is not None:
        expected = torch.tensor([labels.index(_label(row)) for row in data.evaluation])
        accuracy = (router(features(data.evaluation)).argmax(-1) == expected).float().mean().item()
        log.append({"eval_router_accuracy": accuracy})
        logger.info("the router is right for %.1f %% of the held-out rows", 100 * accuracy)

    run = run_folder(recipe)
    clear_staging(run)
    folder = staging_folder(run) / MODEL_FOLDER
    folder.mkdir(parents=True)
    save_file({"weight": router.weight.detach().contiguous(), "bias": router.bias.detach()}, folder / ROUTER_FILE)
    (folder / LABELS_FILE).write_text(json.dumps(labels) + "\n")
    start = Path(recipe.start_from or "")
    history = read_history(start / MODEL_FOLDER if (start / MODEL_FOLDER).is_dir() else start)
    entry = {"stage": "router", "rows": len(data.train), "seed": recipe.seed, "moellava": moellava.__version__}
    write_history(folder, [*history, entry])
    (run / RECIPE_FILE).write_text(yaml.safe_dump(recipe_to_dict(recipe), sort_keys=False))
    (run / LOG_FILE).write_text(json.dumps(log, indent=1) + "\n")
    publish(folder, run / MODEL_FOLDER)
    clear_staging(run)
    return run / MODEL_FOLDER


@torch.no_grad()
def mean_hidden_states(
    model: Any, rows: Sequence[Any], collator: ChatCollator, layers: Sequence[int], batch_size: int, progress: bool
) -> Tensor:
    """What the routers of `layers` would see, averaged over a row's tokens and over layers: (rows, H) float32."""
    seen: list[Tensor] = []
    handles = [
        model.model.language_model.layers[layer].mlp.register_forward_pre_hook(
            lambda _module, inputs: seen.append(inputs[0].float())
        )
        for layer in layers
    ]
    means = []
    try:
        for start in tqdm(range(0, len(rows), batch_size), disable=not progress, unit="batch"):
            batch = collator([rows[index] for index in range(start, min(start + batch_size, len(rows)))])
            batch.pop("labels")
            batch = {name: tensor.to(model.device) for name, tensor in batch.items()}
            seen.clear()
            model(**batch, use_cache=False)
            mask = batch["attention_mask"][..., None].float()  # (B, T, 1)
            mean = torch.stack(seen).mean(0)  # (B, T, H)
            means.append(((mean * mask).sum(1) / mask.sum(1)).cpu())
    finally:
        for handle in handles:
            handle.remove()
    return torch.cat(means)


def fit_linear(features: Tensor, targets: Tensor, num_labels: int, recipe: Recipe) -> nn.Linear:
    """Cross-entropy by Adam, shuffled anew each epoch by the recipe's seed."""
    generator = torch.Generator().manual_seed(recipe.seed)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(recipe.seed)
        router = nn.Linear(features.shape[1], num_labels)
    optimizer = torch.optim.Adam(router.parameters(), lr=recipe.optim.learning_rate)
    for _ in range(int(recipe.optim.epochs)):
        for batch in torch.randperm(len(features), generator=generator).split(recipe.optim.batch_size):
            optimizer.zero_grad()
            F.cross_entropy(router(features[batch]), targets[batch]).backward()
            optimizer.step()
    return router


def _label(row: Any) -> str:
    label = row.extra.get(LABEL_KEY)
    if label is None:
        raise ValueError(f"Row {row.id!r} has no {LABEL_KEY!r}; the router learns it from every row.")
    return str(label)
