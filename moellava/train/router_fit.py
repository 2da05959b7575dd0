"""Med-MoE's router: a linear layer from a tuned model's hidden states to the image's modality.

The router's logits are averaged over a row's tokens and the sparse layers (arXiv 2404.10237,
section 3.2). A linear layer of a mean is the mean of the linear layer, so each row's hidden states
are averaged once and the fit is cheap.

| name | what it does |
|---|---|
| `fit_router` | the router of a recipe and its rows |
| `expert_labels` | the modalities that its experts serve |
| `save_router` | its files |
| `mean_hidden_states`, `fit_linear` | the two steps of the fit |
"""

import json
import logging
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from accelerate.utils import get_int_from_env
from torch import Tensor, nn
from torch.utils.data import DataLoader
from tqdm.auto import tqdm

from moellava.data.rows import Row
from moellava.model.language_model import moe_config_from_dense
from moellava.model.language_model.router_weights import write_router
from moellava.model.modeling_moellava import MoeLlavaForConditionalGeneration
from moellava.storage.writing import write_text
from moellava.train.batches import TrainData, build_collator
from moellava.train.options import Recipe
from moellava.train.prepare import build_model
from moellava.train.router_file import ROUTER_FILE
from moellava.train.stage import LogEntry

logger = logging.getLogger(__name__)

LABEL_KEY = "modality"
LABELS_FILE = "labels.json"  # expert number to label


@dataclass(frozen=True)
class FittedRouter:
    """A router, and what it is for."""

    router: nn.Linear  # H to E
    labels: list[str]  # of each expert
    layers: list[int]  # the sparse layers whose inputs it was fitted to
    log: list[LogEntry]  # a loss for each epoch, and the held-out accuracy


def fit_router(recipe: Recipe, data: TrainData, *, show_progress: bool = True) -> FittedRouter:
    """Fit the router in one process, without checkpoints: it takes one forward pass over the rows.

    Raises:
        ValueError: if a row with an image has no `modality`, there are not as many modalities as
            experts, or there are several processes.
    """
    if get_int_from_env(("WORLD_SIZE",), 1) > 1:
        raise ValueError(
            "Stage 'router' fits one linear layer, in one process. Start it by moellava train "
            "alone."
        )
    rows, names = _labelled(data.train)
    loaded = build_model(recipe)
    mixture = moe_config_from_dense(loaded.model.config.text_config, **recipe.moe.config)
    labels = expert_labels(data.train, mixture.num_experts)
    collator = build_collator(recipe, loaded.processor, return_row_ids=False)
    device = torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")
    loaded.model.to(device)  # type: ignore[arg-type]

    def features(rows: Sequence[Row]) -> Tensor:
        batches: DataLoader[dict[str, Tensor]] = DataLoader(
            rows,  # type: ignore[arg-type]  # a sequence is all that a loader needs
            batch_size=recipe.optim.per_device_batch_size,
            collate_fn=collator,
            num_workers=recipe.data.num_workers,
        )
        with torch.autocast(device.type, torch.bfloat16, enabled=recipe.optim.precision == "bf16"):
            shown = tqdm(batches, disable=not show_progress, unit="batch")
            return mean_hidden_states(loaded.model, shown, mixture.moe_layer_indices)

    targets = torch.tensor([labels.index(name) for name in names])
    router, log = fit_linear(features(rows), targets, len(labels), recipe)
    if data.evaluation is not None:
        held_out, truths = _labelled(data.evaluation)
        if unknown := sorted(set(truths) - set(labels)):
            raise ValueError(
                f"Held-out rows have modalities that no training row has: {', '.join(unknown)}."
            )
        expected = torch.tensor([labels.index(name) for name in truths])
        accuracy = (router(features(held_out)).argmax(-1) == expected).float().mean().item()
        log.append({"eval_router_accuracy": accuracy})
        logger.info("the router is right for %.1f %% of the held-out rows", 100 * accuracy)
    return FittedRouter(router, labels, list(mixture.moe_layer_indices), log)


def expert_labels(rows: Sequence[Row], num_experts: int) -> list[str]:
    """The modalities of the rows, in the order of the experts that will serve them.

    Raises:
        ValueError: if a row with an image has none, or there are not as many as experts.
    """
    labels = sorted(set(_labelled(rows)[1]))
    if len(labels) != num_experts:
        raise ValueError(
            f"The rows have {len(labels)} modalities ({', '.join(labels)}), but "
            f"moe.config.num_experts is {num_experts}. Each expert serves one: set "
            f"moe.config.num_experts={len(labels)}."
        )
    return labels


def save_router(fitted: FittedRouter, folder: Path) -> None:
    """Write `router.safetensors` and `labels.json`.

    The first has `weight` (E, H) and `bias` (E,), and in its metadata the layers that it is for;
    the second has the labels in the experts' order.
    """
    router = fitted.router
    weights = {"weight": router.weight, "bias": router.bias}
    write_router(folder / ROUTER_FILE, weights, layers=fitted.layers, labels=fitted.labels)
    write_text(folder / LABELS_FILE, json.dumps(fitted.labels) + "\n")


@torch.no_grad()
def mean_hidden_states(
    model: MoeLlavaForConditionalGeneration,
    batches: Iterable[Mapping[str, Tensor]],
    layers: Sequence[int],
) -> Tensor:
    """What the routers of `layers` would see, averaged over a row's tokens and over layers.

    Returns:
        (rows, H) float32.
    """
    seen: list[Tensor] = []
    handles = [
        model.model.language_model.layers[layer].mlp.register_forward_pre_hook(
            lambda _module, inputs: seen.append(inputs[0].float())
        )
        for layer in layers
    ]
    means = []
    try:
        for labelled in batches:
            batch = {
                name: tensor.to(model.device)
                for name, tensor in labelled.items()
                if name != "labels"
            }
            seen.clear()
            model(**batch, use_cache=False)
            mask = batch["attention_mask"][..., None].float()  # (B, T, 1)
            mean = torch.stack(seen).mean(0)  # (B, T, H)
            means.append(((mean * mask).sum(1) / mask.sum(1)).cpu())
    finally:
        for handle in handles:
            handle.remove()
    return torch.cat(means)


def fit_linear(
    features: Tensor, targets: Tensor, num_labels: int, recipe: Recipe
) -> tuple[nn.Linear, list[LogEntry]]:
    """Cross-entropy by Adam, shuffled anew each epoch by the recipe's seed.

    Returns:
        The layer, and the mean loss of each epoch.
    """
    generator = torch.Generator().manual_seed(recipe.seed)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(recipe.seed)
        router = nn.Linear(features.shape[1], num_labels)
    optimizer = torch.optim.Adam(router.parameters(), lr=recipe.optim.learning_rate)
    log: list[LogEntry] = []
    for epoch in range(1, math.ceil(recipe.optim.epochs) + 1):
        total = 0.0
        order = torch.randperm(len(features), generator=generator)
        for batch in torch.split(order, recipe.optim.batch_size):
            optimizer.zero_grad()
            loss = F.cross_entropy(router(features[batch]), targets[batch])
            torch.autograd.backward(loss)
            optimizer.step()
            total += loss.item() * len(batch)
        log.append({"epoch": epoch, "loss": total / len(features)})
    return router, log


def _labelled(rows: Sequence[Row]) -> tuple[list[Row], list[str]]:
    """The rows that have a modality, and it; rows without an image need none, and are left out."""
    kept, labels = [], []
    for row in rows:
        label = row.extra.get(LABEL_KEY)
        if label is not None:
            kept.append(row)
            labels.append(str(label))
        elif row.images:
            raise ValueError(
                f"Row {row.id!r} has no {LABEL_KEY!r}; the router learns it from every row with an "
                "image."
            )
    if len(kept) < len(rows):
        logger.info("%d rows without an image are left out", len(rows) - len(kept))
    return kept, labels
