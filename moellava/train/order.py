"""The order in which rows are trained: `EpochSampler`."""

from collections.abc import Iterator, Sequence

import torch
from torch.utils.data import Sampler
from transformers.trainer_pt_utils import get_length_grouped_indices


class EpochSampler(Sampler[int]):
    """Each row once an epoch, in an order that is a function of seed and epoch alone.

    transformers' and accelerate's own samplers depend on how often they were asked before, or lose
    the epoch when a resumed run skips batches on several processes; a run that resumes has to find
    the order again.

    Args:
        num_rows: R; the order is a permutation of 0..R-1.
        seed: of the run.
        lengths: tokens of each row; rows of similar length then come together, by transformers'
            rule. None shuffles.
        group_size: rows of an optimizer step, within which lengths should be alike.
    """

    def __init__(
        self, num_rows: int, *, seed: int, lengths: Sequence[int] | None = None, group_size: int = 1
    ) -> None:
        self.num_rows, self.seed, self.group_size = num_rows, seed, group_size
        self.lengths = None if lengths is None else list(lengths)
        self.epoch = 0

    def __len__(self) -> int:
        return self.num_rows

    def __iter__(self) -> Iterator[int]:
        generator = torch.Generator().manual_seed(self.seed + 1_000_003 * self.epoch)
        if self.lengths is None:
            return iter(torch.randperm(self.num_rows, generator=generator).tolist())
        grouped: list[int] = get_length_grouped_indices(
            self.lengths, self.group_size, generator=generator
        )
        return iter(grouped)
