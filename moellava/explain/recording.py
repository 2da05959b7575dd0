"""A model, its prompt and an answer → attention of the answer to the image, rollout, and routes.

The model computes what it always does; attention weights are computed a second time beside it, from
the same queries and keys, and only the answer's rows and the image's columns are kept.

Letters: T tokens of prompt and answer, A answer tokens, N image tokens, L layers, H heads,
S sparse layers, k experts per token; Tq queries and Tk keys of one pass.

| name | what it gives |
|---|---|
| `Recording` | what the passes over prompt and answer showed |
| `record` | one pass over a given answer |
| `record_generation` | the passes of `generate` themselves |
| `recording_bytes` | the memory that it takes beyond an ordinary pass |
"""

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn
from transformers import DynamicCache, PreTrainedConfig
from transformers.integrations.sdpa_attention import sdpa_attention_forward
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
    """What the passes over prompt and answer showed.

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
    image_sizes: Tensor | None = None,
    max_bytes: int = 2**30,
) -> Recording:
    """Run prompt and answer once, keeping what `Recording` holds.

    Args:
        input_ids: (1, T), the prompt and then the answer.
        pixel_values: (I, 3, H, W).
        image_sizes: as the processor returns them, for a model that needs them.
        max_bytes: refuse to start if the pass takes more memory than this beyond an ordinary one.

    Raises:
        ValueError: if it would take more, or the language model's attention cannot be recorded.
    """
    num_tokens = input_ids.shape[1]
    num_answer = num_tokens - num_prompt_tokens
    num_image_tokens = int((input_ids == model.config.image_token_id).sum())
    needed = recording_bytes(
        model.config.get_text_config(), num_tokens, num_answer, num_image_tokens
    )
    if needed > max_bytes:
        raise ValueError(
            f"Recording takes {needed / 2**20:,.0f} MiB, but max_bytes allows "
            f"{max_bytes / 2**20:,.0f} MiB. Explain a shorter answer (max_new_tokens), pass fewer "
            "images, or raise max_bytes."
        )
    with torch.inference_mode(), _recording(model, input_ids, num_prompt_tokens) as recorder:
        model(
            input_ids=input_ids,
            pixel_values=pixel_values,
            image_sizes=image_sizes,
            use_cache=False,
            logits_to_keep=num_answer + 1,
        )
    return recorder.result(input_ids[0, num_prompt_tokens:])


def record_generation(
    model: MoeLlavaForConditionalGeneration,
    prompt_ids: Tensor,
    generate: Callable[[DynamicCache], list[int]],
) -> tuple[list[int], Recording]:
    """Record the passes of `generate`, so that the answer costs hardly more than without.

    Args:
        prompt_ids: (1, T).
        generate: given an empty cache to fill, greedily or by sampling, returns the answer's ids.

    Returns:
        The answer's ids, and what was recorded of them.
    """
    cache = DynamicCache(config=model.config.get_text_config())
    num_prompt_tokens = prompt_ids.shape[1]
    with torch.inference_mode(), _recording(model, prompt_ids, num_prompt_tokens) as recorder:
        answer_ids = generate(cache)
        ids = torch.cat([prompt_ids, prompt_ids.new_tensor([answer_ids])], dim=1)
        rest = ids[:, cache.get_seq_length() :]  # the last token is chosen, but not run
        if rest.shape[1]:
            model(input_ids=rest, cache=cache, logits_to_keep=1)
    return answer_ids, recorder.result(ids[0, num_prompt_tokens:])


def has_whole_cache(model: MoeLlavaForConditionalGeneration) -> bool:
    """Whether a growing cache keeps all tokens; sliding windows lose the image's."""
    return not any(DynamicCache(config=model.config.get_text_config()).is_sliding)


def recording_bytes(
    text_config: PreTrainedConfig, num_tokens: int, num_answer: int, num_image_tokens: int
) -> int:
    """Memory that recording takes beyond ordinary passes, at most; `num_tokens` are all tokens."""
    num_layers: int = text_config.num_hidden_layers
    vocab_size: int = text_config.vocab_size
    num_heads: int = text_config.num_attention_heads
    kept = num_layers * num_heads * num_answer * num_image_tokens * 4
    logits = 2 * (num_answer + 1) * vocab_size * 4
    squares = 3 * num_tokens**2 * 4  # the heads' sum, that of a chunk, and the mask
    rollout = (num_layers + 3) * num_tokens * num_image_tokens * 4
    return 2 * kept + logits + squares + rollout + 4 * max(CHUNK_BYTES, num_tokens**2 * 4)


class _Recorder:
    """Takes the rows and columns that are asked for, from passes that continue each other."""

    def __init__(self, columns: Tensor, first_row: int) -> None:
        self.columns, self.first_row = columns, first_row
        self.logits: list[Tensor] = []  # (1, rows, V) of each pass
        self.routes: dict[nn.Module, list[tuple[Tensor, Tensor]]] = {}
        self._rows: dict[int, list[Tensor]] = {}  # layer → (H, rows, N) of each pass, on the CPU
        self._rollout: dict[int, Tensor] = {}  # layer → (T, N) so far

    def add(self, layer: int, start: int, heads: Iterator[Tensor]) -> None:
        """The attention of one layer in one pass.

        Args:
            start: how many tokens earlier passes had.
            heads: (heads, Tq, Tk) float32, some heads at a time.
        """
        first = max(0, self.first_row - start)
        kept, sums = [], []
        for weights in heads:
            columns = self.columns.to(weights.device)
            kept.append(weights[:, first:][:, :, columns].cpu())
            sums.append(weights.sum(0))
            sums = [torch.stack(sums).sum(0)]
        own = torch.cat(kept)
        if own.shape[1]:
            self._rows.setdefault(layer, []).append(own)
        self._follow(layer, start, sums[0] / len(own))

    def _follow(self, layer: int, start: int, mean: Tensor) -> None:
        """Half of each token goes on through the residual connection, half where it attended.

        A layer mixes rows only, so the columns of other tokens are never needed.
        """
        if layer == 0:
            places = torch.arange(mean.shape[1], device=mean.device)
            before = (places[:, None] == self.columns.to(mean.device)).float()
        else:
            before = self._rollout[layer - 1].to(mean.device)  # (Tk, N)
        after = 0.5 * before[start:] + 0.5 * (mean @ before)
        if start:
            after = torch.cat([self._rollout[layer], after])
        self._rollout[layer] = after

    def result(self, answer_ids: Tensor) -> Recording:
        """What was recorded of an answer.

        Args:
            answer_ids: (A,).
        """
        if not self._rows:
            raise ValueError(
                "The language model's attention cannot be recorded: it does not go through "
                "transformers' attention interface."
            )
        num_answer = len(answer_ids)
        num_tokens = self.first_row + 1 + num_answer
        rollout = self._rollout[max(self._rollout)][self.first_row :][:num_answer]
        logits = torch.cat(self.logits, dim=1)[0, :num_answer].float()
        chosen = answer_ids[:, None].to(logits.device)
        logprobs = logits.log_softmax(-1).gather(1, chosen)[:, 0]
        require_finite("The model", logprobs)
        routes = [
            [torch.cat(parts)[:num_tokens].numpy() for parts in zip(*passes, strict=True)]
            for passes in self.routes.values()
        ]
        return Recording(
            attention=torch.stack([torch.cat(rows, 1) for rows in self._rows.values()])[
                :, :, :num_answer
            ].numpy(),
            rollout=rollout.cpu().numpy(),
            logprobs=logprobs.cpu().numpy(),
            experts=np.stack([experts for _, experts in routes]) if routes else None,
            weights=np.stack([weights for weights, _ in routes]) if routes else None,
        )


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
    is_causal: bool | None = None,
    **options: object,
) -> tuple[Tensor, None]:
    """transformers' SDPA attention; its weights are shown to the active recorder.

    Args:
        query: (B, H, Tq, d); key and value: (B, H / groups, Tk, d).
        attention_mask: (B, 1, Tq, Tk) as SDPA takes it; None is causal.
    """
    refused = ("softcap", "s_aux", "position_bias")
    if unknown := [name for name in refused if options.get(name) is not None]:
        raise ValueError(
            f"The attention of {type(module).__name__} uses {', '.join(unknown)}, which the "
            "recorder does not compute, so its maps would be wrong."
        )
    recorder = _active.get()
    if recorder is not None:
        start = key.shape[2] - query.shape[2]
        heads = attention_weights(query, key, attention_mask, scaling)
        recorder.add(int(str(module.layer_idx)), start, heads)
    output, _ = sdpa_attention_forward(
        module, query, key, value, attention_mask, dropout, scaling, is_causal
    )
    return output, None


def attention_weights(
    query: Tensor, key: Tensor, mask: Tensor | None, scaling: float
) -> Iterator[Tensor]:
    """transformers' eager attention weights of the first row, (heads, Tq, Tk) at a time."""
    num_heads, num_queries = query.shape[1:3]
    num_keys = key.shape[2]
    if mask is None:
        whole = torch.ones(num_queries, num_keys, dtype=torch.bool, device=query.device)
        mask = whole.tril(num_keys - num_queries)[None, None]
    if mask.dtype == torch.bool:
        mask = torch.zeros_like(mask, dtype=torch.float32).masked_fill(~mask, float("-inf"))
    keys = key[0].repeat_interleave(num_heads // key.shape[1], 0)
    step = max(1, CHUNK_BYTES // (num_queries * num_keys * 4))
    for start in range(0, num_heads, step):
        scores = query[0, start : start + step] @ keys[start : start + step].transpose(1, 2)
        yield (scores * scaling + mask[0]).softmax(dim=-1, dtype=torch.float32)


AttentionInterface.register(IMPLEMENTATION, recording_attention)
AttentionMaskInterface.register(IMPLEMENTATION, ALL_MASK_ATTENTION_FUNCTIONS["sdpa"])


@contextmanager
def _recording(
    model: MoeLlavaForConditionalGeneration, input_ids: Tensor, num_prompt_tokens: int
) -> Iterator[_Recorder]:
    """The language model's passes go to a recorder; those of other threads do not."""
    columns = (input_ids[0] == model.config.image_token_id).nonzero()[:, 0]
    # The row before a token holds the query that chose it.
    recorder = _Recorder(columns, first_row=num_prompt_tokens - 1)
    language_model = model.model.language_model
    with _one_at_a_time:
        before = language_model.config._attn_implementation
        token = _active.set(recorder)
        language_model.set_attn_implementation(IMPLEMENTATION)
        handles = _hooks(model, recorder)
        try:
            yield recorder
        finally:
            for handle in handles:
                handle.remove()
            language_model.set_attn_implementation(before)
            _active.reset(token)


def _hooks(
    model: MoeLlavaForConditionalGeneration, recorder: _Recorder
) -> list[torch.utils.hooks.RemovableHandle]:
    """Show the recorder the weights and experts of every router, (T, k) each, and the logits."""

    def take_route(router: nn.Module, _: object, output: tuple[Tensor, Tensor, Tensor]) -> None:
        if _active.get() is recorder:
            _, weights, experts = output
            own = (weights.float().cpu(), experts.cpu())
            recorder.routes.setdefault(router, []).append(own)

    def take_logits(head: nn.Module, _: object, logits: Tensor) -> None:
        if _active.get() is recorder:
            recorder.logits.append(logits)

    routers = [module for module in model.modules() if isinstance(module, LlamaMoeRouter)]
    handles = [router.register_forward_hook(take_route) for router in routers]
    return [*handles, model.lm_head.register_forward_hook(take_logits)]
