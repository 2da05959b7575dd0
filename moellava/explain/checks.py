"""A map and the model that it is about → numbers that say whether the map deserves belief.

Letters: I images, R x C blocks of pixels.

| name | what it gives |
|---|---|
| `curve` | the answer's log-probability while blocks are deleted or inserted in an order |
| `order_of` | blocks by a map, the highest first |
| `rank_correlation` | how alike two maps are, -1 to 1 |
| `randomised_layers` | a model with the last layers drawn anew, while it lasts |
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from moellava.explain.effects import AnswerScorer, mix_blocks
from moellava.model.modeling_moellava import MoeLlavaForConditionalGeneration

Array = npt.NDArray[np.float32]
Integers = npt.NDArray[np.int64]


def order_of(values: Array) -> Integers:
    """Flat numbers of the blocks (I, R, C) of a map, highest value first."""
    order: Integers = np.argsort(-values.ravel(), kind="stable")
    return order


@torch.inference_mode()
def curve(
    scorer: AnswerScorer,
    pixel_values: Tensor,
    order: Sequence[int] | Integers,
    blocks: tuple[int, int],
    *,
    insert: bool = False,
    batch_size: int = 8,
) -> Array:
    """The answer's log-probability after 0, 1, 2, ... blocks became the mean colour.

    A map that finds what matters makes it fall faster than a random order; with `insert`, blocks
    come back onto the blank image, and it rises faster (RISE, arXiv 1806.07421).

    Args:
        pixel_values: (I, 3, H, W).
        order: flat numbers of the blocks (I, R, C), the first to change first.

    Returns:
        (blocks + 1,) float32, in nats.
    """
    num_images = len(pixel_values)
    num_blocks = num_images * blocks[0] * blocks[1]
    keep = torch.full((num_blocks + 1, num_blocks), 0.0 if insert else 1.0)
    for step, block in enumerate(order):
        keep[step + 1 :, block] = 1.0 if insert else 0.0
    grids = keep.view(-1, num_images, *blocks).to(pixel_values.device)
    scores = [
        scorer(mix_blocks(pixel_values, grids[start : start + batch_size])).sum(-1).cpu()
        for start in range(0, len(grids), batch_size)
    ]
    return torch.cat(scores).float().numpy()


def rank_correlation(first: Array, second: Array) -> float:
    """Spearman's correlation of two maps of one shape; 0 if one of them is flat."""
    ranks = [_ranks(values.ravel()) for values in (first, second)]
    if any(values.std() == 0 for values in ranks):
        return 0.0
    return float(np.corrcoef(ranks[0], ranks[1])[0, 1])


def _ranks(values: Array) -> npt.NDArray[np.float64]:
    """Ranks from 0; equal values share the mean of theirs."""
    _, inverse, counts = np.unique(values, return_inverse=True, return_counts=True)
    last = np.cumsum(counts)
    ranks: npt.NDArray[np.float64] = (last - (counts + 1) / 2)[inverse]
    return ranks


@contextmanager
def randomised_layers(
    model: MoeLlavaForConditionalGeneration, num_layers: int, seed: int = 0
) -> Iterator[None]:
    """While it lasts, the last `num_layers` layers of the language model have shuffled weights.

    Each weight keeps its values in a random order, so their scale stays (the sanity checks of
    arXiv 1810.03292). A map that does not change says nothing about the model.
    """
    layers = list(model.model.language_model.layers)
    weights = [
        weight for layer in layers[len(layers) - num_layers :] for weight in layer.parameters()
    ]
    generator = torch.Generator().manual_seed(seed)
    before = [weight.detach().clone() for weight in weights]
    try:
        with torch.no_grad():
            for weight in weights:
                order = torch.randperm(weight.numel(), generator=generator).to(weight.device)
                weight.copy_(weight.flatten()[order].view_as(weight))
        yield
    finally:
        with torch.no_grad():
            for weight, saved in zip(weights, before, strict=True):
                weight.copy_(saved)
