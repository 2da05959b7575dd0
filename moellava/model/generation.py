"""The one way from prompts to answers, whole or while they grow.

| name | gives |
|---|---|
| `generate_texts` | the new text of each prompt |
| `generate_answers` | the same into `GrowingAnswer`s, which tell of every piece of text |
| `stream_pieces` | an iterator over the pieces of one answer |
| `turn_end_options` | what makes an answer end where the chat template ends a turn |
| `require_generation_options` | an error that suggests, for an option that `generate` lacks |
| `require_room` | an error that counts, if a prompt and its answer exceed the context |
"""

import inspect
import re
import threading
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from queue import SimpleQueue
from typing import Any, Literal

import torch
from torch import Tensor
from transformers import (
    GenerationConfig,
    GenerationMixin,
    LogitsProcessor,
    LogitsProcessorList,
    PreTrainedTokenizerBase,
    StoppingCriteria,
    StoppingCriteriaList,
)

from moellava.messages import did_you_mean
from moellava.model.chat_templates import end_of_turn
from moellava.storage.weights import require_finite

DEFAULT_MAX_NEW_TOKENS = 64
FinishReason = Literal["stop", "length", "cancelled"]
_BYTE_TOKEN = re.compile(r"<0x[0-9A-F]{2}>")
_UNDECODED = "\N{REPLACEMENT CHARACTER}"


@dataclass(frozen=True)
class TokenLogprob:
    """The log-probability of a chosen token, and the likeliest tokens at its place with theirs."""

    token_id: int
    logprob: float
    top: tuple[tuple[int, float], ...] = ()


class GrowingAnswer:
    """One answer, fed token by token.

    The pieces that `on_piece` gets, joined, are `text`: the decoded tokens without special ones,
    up to the first stop string, without surrounding white space.

    Args:
        end_ids: tokens that end the answer.
        on_piece: called with every further piece of text, in the thread that generates.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        *,
        end_ids: Collection[int] = (),
        max_new_tokens: int = DEFAULT_MAX_NEW_TOKENS,
        stop_strings: Sequence[str] = (),
        on_piece: Callable[[str], None] | None = None,
    ) -> None:
        self.token_ids: list[int] = []
        self.logprobs: list[TokenLogprob] = []
        self.text = ""  # so far; final once there is a finish_reason
        self.finish_reason: FinishReason | None = None
        self.max_new_tokens = max_new_tokens
        self.on_piece = on_piece
        self._tokenizer = tokenizer
        self._special_ids = frozenset(tokenizer.all_special_ids)
        self._end_ids = frozenset(end_ids)
        self._stop_strings = tuple(stop_strings)
        self._is_cancelled = False

    def cancel(self) -> None:
        """Ask for the end of the answer after the token that is being computed; from any thread."""
        self._is_cancelled = True

    @property
    def is_done(self) -> bool:
        """Whether no further token counts."""
        if self._is_cancelled:
            self.finish("cancelled")
        return self.finish_reason is not None

    def add(self, token: int, logprob: TokenLogprob | None = None) -> None:
        """Take the next token; ignored once the answer is done, as the padding of a batch is."""
        if self.is_done:
            return
        self.token_ids.append(token)
        if logprob is not None:
            self.logprobs.append(logprob)
        if token in self._end_ids or self._has_stop():
            self.finish("stop")
        elif len(self.token_ids) >= self.max_new_tokens:
            self.finish("length")
        elif self.on_piece is not None:
            self._emit(self._settled())

    def finish(self, reason: FinishReason) -> None:
        """Settle the text; does nothing if the answer is done."""
        if self.finish_reason is not None:
            return
        self.finish_reason = reason
        whole = self._decode(self.token_ids)
        self._emit(whole[: self._first_stop(whole)].strip())

    def _emit(self, text: str) -> None:
        piece = text[len(self.text) :]
        self.text = text
        if piece and self.on_piece is not None:
            self.on_piece(piece)

    def _settled(self) -> str:
        """The text that no later token can change."""
        ids = self.token_ids
        settled = len(ids)
        # A run of bytes is decoded as a whole: a later byte can spoil the characters before it.
        # Special tokens are left out of the text and do not end a run.
        while settled and self._is_open(ids[settled - 1]):
            settled -= 1
        text = self._decode(ids[:settled]).rstrip(_UNDECODED)
        return text[: self._possible_stop(text)].strip()

    def _is_open(self, token: int) -> bool:
        name = str(self._tokenizer.convert_ids_to_tokens(token))
        return token in self._special_ids or _BYTE_TOKEN.fullmatch(name) is not None

    def _decode(self, ids: list[int]) -> str:
        # Cleaning up "do n't" would change text that has been streamed.
        return str(
            self._tokenizer.decode(
                ids, skip_special_tokens=True, clean_up_tokenization_spaces=False
            )
        )

    def _has_stop(self) -> bool:
        has_any = bool(self._stop_strings)  # decoding everything at each step is not free
        return has_any and self._first_stop(self._decode(self.token_ids)) is not None

    def _first_stop(self, text: str) -> int | None:
        places = [text.find(stop) for stop in self._stop_strings]
        return min((place for place in places if place >= 0), default=None)

    def _possible_stop(self, text: str) -> int:
        """Where the longest ending that could begin a stop string starts."""
        longest = max((len(stop) for stop in self._stop_strings), default=0)
        for start in range(max(0, len(text) - longest), len(text)):
            if any(stop.startswith(text[start:]) for stop in self._stop_strings):
                return start
        return len(text)


def generate_texts(
    model: GenerationMixin,
    tokenizer: PreTrainedTokenizerBase,
    inputs: Mapping[str, Any],
    **generation: Any,
) -> list[str]:
    """Continue left-padded prompts, greedily unless told otherwise.

    Args:
        inputs: what the processor made of the prompts, on the model's device.
        **generation: passed to `generate`; `max_new_tokens` is 64 unless given.

    Returns:
        The new text of each prompt, without special tokens and surrounding white space;
        `num_return_sequences` texts per prompt if that is given.

    Raises:
        TypeError: for an option that `generate` does not have.
    """
    require_generation_options(generation)
    num_rows = len(inputs["input_ids"]) * (generation.get("num_return_sequences") or 1)
    answers = [new_answer(model, tokenizer, generation) for _ in range(num_rows)]
    generate_answers(model, inputs, answers, **generation)
    return [answer.text for answer in answers]


def new_answer(
    model: GenerationMixin,
    tokenizer: PreTrainedTokenizerBase,
    generation: Mapping[str, Any],
    on_piece: Callable[[str], None] | None = None,
) -> GrowingAnswer:
    """An empty answer that ends as the options for `generate` say."""
    stop_strings = generation.get("stop_strings") or ()
    return GrowingAnswer(
        tokenizer,
        end_ids=_end_ids(model, generation),
        max_new_tokens=generation.get("max_new_tokens") or DEFAULT_MAX_NEW_TOKENS,
        stop_strings=[stop_strings] if isinstance(stop_strings, str) else stop_strings,
        on_piece=on_piece,
    )


@torch.inference_mode()
def generate_answers(
    model: GenerationMixin,
    inputs: Mapping[str, Any],
    answers: Sequence[GrowingAnswer],
    *,
    top_logprobs: int | None = None,
    **generation: Any,
) -> Tensor:
    """Let each row of a left-padded batch grow its answer until all are done.

    With beams the answers get their tokens at the end, since a beam may still be given up.

    Args:
        inputs: as for `generate_texts`; `cache` may hold the beginning of the prompts.
        answers: one per row, from `new_answer`.
        top_logprobs: also record log-probabilities, before temperature, of the chosen tokens and of
            this many likeliest ones.

    Returns:
        (B, T + new): all tokens, prompts included.
    """
    # A stored max_length (TinyLlama's is 2048) would be a second limit beside max_new_tokens.
    options = {"do_sample": False, "max_length": None, **generation}
    options["max_new_tokens"] = max(answer.max_new_tokens for answer in answers)
    options.pop("stop_strings", None)  # the answers see to it, and cut the text
    processors = [*(options.pop("logits_processor", None) or ()), _require_finite_scores]
    num_prompt_tokens = inputs["input_ids"].shape[1]
    if options.get("num_beams", 1) == 1:
        recorder = _Recorder(top_logprobs)
        follower = _Follower(answers, num_prompt_tokens, recorder)
        criteria = options.pop("stopping_criteria", None) or ()
        options["stopping_criteria"] = StoppingCriteriaList([*criteria, follower])
        if top_logprobs is not None:
            processors.append(recorder)
    elif top_logprobs is not None:
        raise ValueError("top_logprobs cannot be recorded with beams. Leave one of them out.")
    options["logits_processor"] = LogitsProcessorList(processors)
    generated: Any = model.generate(**inputs, **options)
    # (B, T + new), alone or beside scores and hidden states
    sequences: Tensor = generated if isinstance(generated, Tensor) else generated.sequences
    for answer, tokens in zip(answers, sequences[:, num_prompt_tokens:].tolist(), strict=True):
        for token in tokens[len(answer.token_ids) :]:
            answer.add(token)
        answer.finish("length")
    return sequences


def stream_pieces(answer: GrowingAnswer, run: Callable[[], object]) -> Iterator[str]:
    """The pieces of an answer while `run`, in a thread of its own, generates it.

    Closing the iterator, or leaving the loop over it, stops the answer after the present token.
    """
    pieces: SimpleQueue[str | None] = SimpleQueue()
    errors: list[BaseException] = []

    def work() -> None:
        try:
            run()
        except BaseException as error:  # raised again by whoever reads
            errors.append(error)
        finally:
            pieces.put(None)

    answer.on_piece = pieces.put
    thread = threading.Thread(target=work, name="moellava-generate", daemon=True)
    thread.start()
    try:
        while (piece := pieces.get()) is not None:
            yield piece
    finally:
        answer.cancel()
        thread.join()
    if errors:
        raise errors[0]


def turn_end_options(
    model: GenerationMixin, tokenizer: PreTrainedTokenizerBase, template: str
) -> dict[str, list[int] | list[str]]:
    """`eos_token_id` or `stop_strings` for `generate_texts`, so that an answer is one turn.

    Empty if the template ends a turn with a token at which the model stops anyway.
    """
    end = end_of_turn(tokenizer, template).strip()
    ids = tokenizer.encode(end, add_special_tokens=False) if end else []
    known = _end_ids(model, {})
    if not end or (len(ids) == 1 and ids[0] in known):
        return {}
    token = tokenizer.convert_tokens_to_ids(end)
    if isinstance(token, int) and token != tokenizer.unk_token_id:
        return {} if token in known else {"eos_token_id": [*known, token]}
    return {"stop_strings": [end]}


def require_generation_options(given: Mapping[str, object]) -> None:
    """Raise `TypeError` for a name that `generate` does not know; the nearest one is suggested."""
    known = {
        *inspect.signature(GenerationMixin.generate).parameters,
        *GenerationConfig().to_dict(),
    }
    for name in given:
        if name not in known:
            raise TypeError(
                f"generate has no option {name!r}.{did_you_mean(name, sorted(known))} The options "
                "are those of transformers' GenerationConfig."
            )


def require_room(
    num_tokens: int, num_image_tokens: int, max_new_tokens: int, context_len: int, what: str
) -> None:
    """Raise `ValueError` if a prompt and its answer exceed the context; the excess is counted."""
    excess = num_tokens + max_new_tokens - context_len
    if excess > 0:
        raise ValueError(
            f"{what} has {num_tokens} tokens ({num_image_tokens} of images, "
            f"{num_tokens - num_image_tokens} of text) and max_new_tokens is {max_new_tokens}, but "
            f"the context holds {context_len}: {excess} tokens would be cut. Shorten the text, "
            "pass fewer images or tiles, or lower max_new_tokens."
        )


def _end_ids(model: GenerationMixin, generation: Mapping[str, Any]) -> list[int]:
    config: Any = generation.get("generation_config") or model.generation_config
    ids = generation.get("eos_token_id", config.eos_token_id)
    if ids is None:
        return []
    return [ids] if isinstance(ids, int) else [int(token) for token in ids]


def _require_finite_scores(input_ids: Tensor, scores: Tensor) -> Tensor:
    """A logits processor: NaN would become an answer that looks like any other.

    Tokens that are forbidden have the score -inf, but not all of them.
    """
    require_finite("The model", scores.amax(dim=-1))
    return scores


class _Recorder(LogitsProcessor):
    """Keeps the scores that the next token is drawn from, before temperature and the like."""

    def __init__(self, num_top: int | None) -> None:
        self._num_top = num_top
        self._scores: Tensor | None = None

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        self._scores = scores
        return scores

    def of(self, row: int, token: int) -> TokenLogprob | None:
        if self._num_top is None or self._scores is None:
            return None
        logprobs = self._scores[row].float().log_softmax(-1)  # (V,)
        top = logprobs.topk(self._num_top)
        pairs = zip(top.indices.tolist(), top.values.tolist(), strict=True)
        return TokenLogprob(token, float(logprobs[token]), tuple(pairs))


class _Follower(StoppingCriteria):
    """Hands each new token to its answer and stops the rows whose answers are done."""

    def __init__(
        self, answers: Sequence[GrowingAnswer], num_seen: int, recorder: _Recorder
    ) -> None:
        self._answers = answers
        self._num_seen = num_seen
        self._recorder = recorder

    def __call__(self, input_ids: Tensor, scores: object, **kwargs: object) -> Tensor:
        new = input_ids[:, self._num_seen :].tolist()
        self._num_seen = input_ids.shape[1]
        for row, (answer, tokens) in enumerate(zip(self._answers, new, strict=True)):
            for token in tokens:
                if not answer.is_done:
                    answer.add(token, self._recorder.of(row, token))
        is_done = [answer.is_done for answer in self._answers]
        return torch.tensor(is_done, device=input_ids.device)
