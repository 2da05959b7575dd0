"""Router logits of training steps → the load of each expert, apart for image and text tokens.

L sparse layers, E experts, N tokens of a batch.

`RouterLoad` counts; `load_by_name` names each share for TensorBoard and its like.
"""

from collections.abc import Callable, Sequence
from typing import Literal, TypedDict

import torch
from torch import Tensor


class Load(TypedDict):
    """The shares of experts since the last log entry."""

    layers: list[int]  # indices of the L sparse layers
    image: list[list[float]]  # L lists of E shares that sum to 1; zeros without such a token
    text: list[list[float]]


KINDS: tuple[Literal["image"], Literal["text"]] = ("image", "text")


class RouterLoad:
    """Counts since the last `flush`; on the model's device, so that counting waits for nothing.

    Args:
        top_k: experts that each token goes to.
        layers: indices of the L sparse layers in the model.
    """

    def __init__(self, top_k: int, layers: Sequence[int]) -> None:
        self.top_k, self.layers = top_k, list(layers)
        self._counts: Tensor | None = None

    def add(
        self, router_logits: Sequence[Tensor], is_image: Tensor, attention_mask: Tensor | None
    ) -> None:
        """Count one batch.

        Args:
            router_logits: L tensors (N, E).
            is_image: (B, T) bool, where the placeholders stand; B*T = N.
            attention_mask: (B, T), 0 for padding, or None where there is none.
        """
        logits = torch.stack([layer.detach() for layer in router_logits])  # (L, N, E)
        chosen = torch.zeros_like(logits).scatter_(2, logits.topk(self.top_k, dim=-1).indices, 1.0)
        image = is_image.flatten().to(logits.dtype)
        token = (
            torch.ones_like(image)
            if attention_mask is None
            else attention_mask.flatten().to(logits.dtype)
        )
        kinds = torch.stack([image * token, (1 - image) * token])  # (2, N)
        counts = torch.einsum("kn,lne->kle", kinds, chosen)
        self._counts = counts if self._counts is None else self._counts + counts

    def flush(self, reduce: Callable[[Tensor], Tensor]) -> Load | None:
        """The share of the assignments that each expert received, and begin anew.

        Args:
            reduce: sums a tensor over the processes.

        Returns:
            None if nothing was counted.
        """
        if self._counts is None:
            return None
        counts = reduce(self._counts)
        self._counts = None
        shares = counts / counts.sum(-1, keepdim=True).clamp(min=1)
        image, text = (
            [[round(share, 4) for share in layer] for layer in layers] for layers in shares.tolist()
        )
        return {"layers": self.layers, "image": image, "text": text}


def load_by_name(load: Load | None) -> dict[str, float]:
    """The shares as one number for each expert, named as TensorBoard and its like group them."""
    if load is None:
        return {}
    return {
        f"load_{kind}/layer{layer}_expert{expert}": share
        for kind in KINDS
        for layer, shares in zip(load["layers"], load[kind], strict=True)
        for expert, share in enumerate(shares)
    }
