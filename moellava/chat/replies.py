"""An answer → the JSON of OpenAI's chat completions, whole or as chunks: `Reply`."""

import json
import time
import uuid
from collections.abc import Sequence

from transformers import PreTrainedTokenizerBase

from moellava.model.generation import GrowingAnswer, TokenLogprob


class Reply:
    """The objects of one completion; all carry the same id, time and model."""

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        model: str,
        answer: GrowingAnswer,
        num_prompt_tokens: int,
    ) -> None:
        self._tokenizer = tokenizer
        self._answer = answer
        self._num_prompt_tokens = num_prompt_tokens
        self._head = {
            "id": f"chatcmpl-{uuid.uuid4().hex}",
            "created": int(time.time()),
            "model": model,
        }
        self._num_told = 0  # tokens whose log-probabilities were sent

    def whole(self) -> dict[str, object]:
        """The completion as one object."""
        choice = {
            "index": 0,
            "message": {"role": "assistant", "content": self._answer.text},
            "finish_reason": self._finish_reason(),
            "logprobs": self._logprobs(),
        }
        return {
            **self._head,
            "object": "chat.completion",
            "choices": [choice],
            "usage": self._usage(),
        }

    def chunk(self, delta: dict[str, str], *, is_last: bool = False) -> bytes:
        """A server-sent event with the next piece."""
        choice = {
            "index": 0,
            "delta": delta,
            "finish_reason": self._finish_reason() if is_last else None,
            "logprobs": self._logprobs(),
        }
        return self._event([choice])

    def usage_chunk(self) -> bytes:
        """The event that only counts tokens."""
        return self._event([], usage=self._usage())

    def _event(self, choices: Sequence[object], **more: object) -> bytes:
        content = {
            **self._head,
            "object": "chat.completion.chunk",
            "choices": list(choices),
            **more,
        }
        return event(content)

    def _finish_reason(self) -> str:
        return "length" if self._answer.finish_reason == "length" else "stop"

    def _usage(self) -> dict[str, int]:
        num_new = len(self._answer.token_ids)
        return {
            "prompt_tokens": self._num_prompt_tokens,
            "completion_tokens": num_new,
            "total_tokens": self._num_prompt_tokens + num_new,
        }

    def _logprobs(self) -> dict[str, object] | None:
        """Of the tokens since the last call; None if none were asked for."""
        known = self._answer.logprobs
        if not known:
            return None
        new = known[self._num_told :]
        self._num_told += len(new)
        return {"content": [self._token(item) for item in new], "refusal": None}

    def _token(self, item: TokenLogprob) -> dict[str, object]:
        top = [self._entry(token, logprob) for token, logprob in item.top]
        return {**self._entry(item.token_id, item.logprob), "top_logprobs": top}

    def _entry(self, token_id: int, logprob: float) -> dict[str, object]:
        text = str(self._tokenizer.convert_ids_to_tokens(token_id))
        return {"token": text, "logprob": logprob, "bytes": list(text.encode())}


def event(content: object) -> bytes:
    """A server-sent event."""
    return f"data: {json.dumps(content, ensure_ascii=False)}\n\n".encode()
