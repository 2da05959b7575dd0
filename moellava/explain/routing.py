"""Experts and weights of every token → loads and flows, by layer and phase.

Letters: S sparse layers, T tokens, E experts, k experts per token.

| name | what it gives |
|---|---|
| `PHASES` | what a token belongs to: the image, the question (all text of the prompt), the answer |
| `Routing` | the routes of one prompt and its answer, as arrays |
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

# Image and question are read at once (prefill); the answer is written token by token (decoding).
PHASES = ("image", "question", "answer")

Array = npt.NDArray[np.float32]
Integers = npt.NDArray[np.int64]


@dataclass(frozen=True, kw_only=True)
class Routing:
    """Where every token of a prompt and its answer went.

    Args:
        layers: index in the language model of each of the S sparse layers.
        num_experts: E.
        experts: (S, T, k), most probable first.
        weights: (S, T, k) float32, of each expert in the block's sum.
        tokens: T texts; an image token is `<image>`.
        phases: T of `PHASES`.
    """

    layers: tuple[int, ...]
    num_experts: int
    experts: Integers
    weights: Array
    tokens: tuple[str, ...]
    phases: tuple[str, ...]

    def is_phase(self, phase: str) -> npt.NDArray[np.bool_]:
        """(T,) whether each token belongs to a phase."""
        return np.array([own == phase for own in self.phases], dtype=np.bool_)

    def counts(self, phase: str) -> Integers:
        """(S, E): how many tokens of a phase each expert received, as any of their k."""
        return count_experts(self.experts[:, self.is_phase(phase)], self.num_experts)

    def load(self, phase: str) -> Array:
        """(S, E): the share of a phase's assignments that each expert received."""
        return shares(self.counts(phase))

    def flows(self, phase: str) -> Array:
        """(S - 1, E, E): the weight that goes from each expert to each of the next sparse layer.

        A token that gives weights a and b to experts of two layers adds a * b to that pair, so all
        k experts count. Divided by the number of tokens.
        """
        spread = self.spread()[:, self.is_phase(phase)]  # (S, T, E)
        num_tokens = max(1, spread.shape[1])
        flows: Array = np.einsum("ste,stf->sef", spread[:-1], spread[1:]) / num_tokens
        return flows.astype(np.float32)

    def spread(self) -> Array:
        """(S, T, E): the weight of every expert for every token, 0 if not chosen; sums to 1."""
        spread = np.zeros((*self.experts.shape[:2], self.num_experts), dtype=np.float32)
        np.put_along_axis(spread, self.experts, self.weights, axis=2)
        spread /= spread.sum(-1, keepdims=True)
        return spread


def count_experts(experts: Integers, num_experts: int) -> Integers:
    """(S, T, k) expert indices → (S, E) counts."""
    flat = experts.reshape(len(experts), -1)
    counts = [np.bincount(layer, minlength=num_experts) for layer in flat]
    return np.array(counts, dtype=np.int64)


def shares(counts: npt.NDArray[np.int64] | Array) -> Array:
    """Counts as shares of their last axis; zeros if there is nothing to share."""
    total = counts.sum(-1, keepdims=True)
    result: Array = (counts / np.maximum(total, 1)).astype(np.float32)
    return result


def phases_of(is_image: Sequence[bool], num_prompt_tokens: int) -> tuple[str, ...]:
    """The phase of each token of a prompt and its answer."""
    return tuple(
        "answer" if position >= num_prompt_tokens else "image" if image else "question"
        for position, image in enumerate(is_image)
    )
