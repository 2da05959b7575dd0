"""A model, its prompt and an answer → attention of the answer to the image, rollout, and routes.

Letters: T tokens of prompt and answer, A answer tokens, N image tokens, L layers, H heads,
S sparse layers, k experts per token.

| name | what it gives |
|---|---|
| `Recording` | what one forward pass showed |
| `record` | that pass, keeping only the answer's rows and the image's columns |
| `recording_bytes` | the memory that it takes beyond an ordinary pass |
"""

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, AttentionMaskInterface
from transformers.modeling_utils import AttentionInterface

from moellava.model.language_model.moe import LlamaMoeRouter
from moellava.model.modeling_moellava import MoeLlavaForConditionalGeneration
from moellava.storage.weights import require_finite

IMPLEMENTATION = "moellava_recording"
# Scores of as many heads at once as fit into this; all heads of a long prompt would take gigabytes.
CHUNK_BYTES = 64 * 2**20

Array = npt.NDArray[np.float32]


@dataclass(frozen=True, kw_only=True)
class Recording:
    """What one forward pass over prompt and answer showed.

    Args:
        attention: (L, H, A, N) float32; row a is that of the query which chose answer token a.
        rollout: (A, N) float32, attention followed through the layers (arXiv 2005.00928).
        logprobs: (A,) float32, natural logarithm of each answer token's probability.
        experts: (S, T, k) int64, the experts that each token went to; None for a dense model.
        weights: (S, T, k) float32, their weights in the block's sum.
    """

    attention: Array
    rollout: Array
    logprobs: Array
    experts: npt.NDArray[np.int64] | None
    weights: Array | None


def record(
    model: MoeLlavaForConditionalGeneration,
    input_ids: Tensor,
    pixel_values: Tensor,
    *,
    num_prompt_tokens: int,
    max_bytes: int = 2**30,
) -> Recording:
    """Run prompt and answer once with eager attention, keeping what `Recording` holds.

    Args:
        input_ids: (1, T), the prompt and then the answer.
        pixel_values: (I, 3, H, W).
        max_bytes: refuse to start if the pass takes more memory than this beyond an ordinary one.

    Raises:
        ValueError: if it would take more, or the language model's attention cannot be recorded.
    """
    num_tokens = input_ids.shape[1]
    num_answer = num_tokens - num_prompt_tokens
    columns = (input_ids[0] == model.config.image_token_id).nonzero()[:, 0]
    _require_memory(
        recording_bytes(model.config.get_text_config(), num_tokens, num_answer, len(columns)),
        max_bytes,
    )
    # The row before a token holds the query that chose it.
    rows = torch.arange(num_prompt_tokens - 1, num_tokens - 1, device=input_ids.device)
    recorder = _Recorder(rows, columns, num_tokens)
    with torch.inference_mode(), _attention_to(recorder, model), _routes(model) as routes:
        logits = model(
            input_ids=input_ids,
            pixel_values=pixel_values,
            use_cache=False,
            logits_to_keep=num_answer + 1,
        ).logits  # (1, A + 1, V)
    if not recorder.layers:
        raise ValueError(
            f"The attention of {type(model.model.language_model).__name__} cannot be recorded: it "
            "does not go through transformers' attention interface."
        )
    chosen = input_ids[0, num_prompt_tokens:]
    logprobs = logits[0, :-1].float().log_softmax(-1).gather(1, chosen[:, None])[:, 0]
    require_finite("The model", logprobs)
    return Recording(
        attention=torch.stack(recorder.layers).numpy(),
        rollout=recorder.rollout[rows][:, columns].cpu().numpy(),
        logprobs=logprobs.cpu().numpy(),
        experts=torch.stack([index for _, index in routes]).numpy() if routes else None,
        weights=torch.stack([weights for weights, _ in routes]).numpy() if routes else None,
    )


def recording_bytes(
    text_config: PreTrainedConfig, num_tokens: int, num_answer: int, num_image_tokens: int
) -> int:
    """Memory that `record` takes beyond an ordinary forward pass, at most."""
    num_heads: int = text_config.num_attention_heads
    num_layers: int = text_config.num_hidden_layers
    kept = num_layers * num_heads * num_answer * num_image_tokens * 4
    squares = 4 * num_tokens**2 * 4  # the rollout, its product, the heads' mean and the mask
    return 2 * kept + squares + 4 * max(CHUNK_BYTES, num_tokens**2 * 4)


def _require_memory(needed: int, limit: int) -> None:
    if needed > limit:
        raise ValueError(
            f"Recording takes {needed / 2**20:,.0f} MiB, but max_bytes allows "
            f"{limit / 2**20:,.0f} MiB. Explain a shorter answer (max_new_tokens), pass fewer "
            "images, or raise max_bytes."
        )


class _Recorder:
    """Takes the rows and columns that are asked for from one layer after the other."""

    def __init__(self, rows: Tensor, columns: Tensor, num_tokens: int) -> None:
        self.rows, self.columns = rows, columns
        self.layers: list[Tensor] = []  # L of (H, A, N) float32, on the CPU
        self.rollout = torch.eye(num_tokens, device=rows.device)  # (T, T)
        self._heads: list[Tensor] = []
        self._sum: Tensor | None = None

    def add_heads(self, weights: Tensor) -> None:
        """(heads, T, T) float32 of some heads of the present layer."""
        self._heads.append(weights[:, self.rows][:, :, self.columns].cpu())
        total = weights.sum(0)
        self._sum = total if self._sum is None else self._sum + total

    def end_layer(self) -> None:
        """The present layer is complete."""
        assert self._sum is not None
        heads = torch.cat(self._heads)
        self.layers.append(heads)
        mean = self._sum / len(heads)
        # Half of each token goes on through the residual connection.
        self.rollout = 0.5 * self.rollout + 0.5 * (mean.to(self.rollout.device) @ self.rollout)
        self._heads, self._sum = [], None


_active: ContextVar[_Recorder | None] = ContextVar("recorder", default=None)
_one_at_a_time = threading.Lock()


def recording_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float,
    dropout: float = 0.0,
    **options: object,
) -> tuple[Tensor, None]:
    """transformers' eager attention, some heads at a time, each shown to the active recorder.

    Args:
        query: (B, H, T, d); key and value: (B, H / groups, T, d).
        attention_mask: (B, 1, T, T), added to the scores.
    """
    if unknown := [name for name in ("softcap", "s_aux") if options.get(name) is not None]:
        raise ValueError(
            f"The attention of {type(module).__name__} uses {', '.join(unknown)}, which the "
            "recorder does not compute, so its maps would be wrong."
        )
    recorder = _active.get()
    num_heads, num_tokens = query.shape[1:3]
    groups = num_heads // key.shape[1]
    key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
    step = max(1, CHUNK_BYTES // (len(query) * num_tokens * key.shape[2] * 4))
    outputs = []
    for start in range(0, num_heads, step):
        heads = slice(start, start + step)
        scores = torch.matmul(query[:, heads], key[:, heads].transpose(2, 3)) * scaling
        if attention_mask is not None:
            scores = scores + attention_mask
        weights = scores.softmax(dim=-1, dtype=torch.float32)  # (B, heads, T, T)
        if recorder is not None:
            recorder.add_heads(weights[0])
        outputs.append(torch.matmul(weights.to(query.dtype), value[:, heads]))
    if recorder is not None:
        recorder.end_layer()
    return torch.cat(outputs, dim=1).transpose(1, 2).contiguous(), None


AttentionInterface.register(IMPLEMENTATION, recording_attention)
AttentionMaskInterface.register(IMPLEMENTATION, ALL_MASK_ATTENTION_FUNCTIONS["eager"])


@contextmanager
def _attention_to(recorder: _Recorder, model: MoeLlavaForConditionalGeneration) -> Iterator[None]:
    """The language model's attention goes to a recorder; other threads are not recorded."""
    language_model = model.model.language_model
    with _one_at_a_time:
        before = language_model.config._attn_implementation
        token = _active.set(recorder)
        language_model.set_attn_implementation(IMPLEMENTATION)
        try:
            yield
        finally:
            language_model.set_attn_implementation(before)
            _active.reset(token)


@contextmanager
def _routes(model: nn.Module) -> Iterator[list[tuple[Tensor, Tensor]]]:
    """Weights and experts, (T, k) each, of every router that runs meanwhile, in order."""
    routes: list[tuple[Tensor, Tensor]] = []

    def take(module: nn.Module, inputs: object, output: tuple[Tensor, Tensor, Tensor]) -> None:
        _, weights, index = output
        routes.append((weights.float().cpu(), index.cpu()))

    routers = [module for module in model.modules() if isinstance(module, LlamaMoeRouter)]
    handles = [router.register_forward_hook(take) for router in routers]
    try:
        yield routes
    finally:
        for handle in handles:
            handle.remove()
