"""Logits at an answer's first position → shares of the options: `OptionTokens`."""

from collections.abc import Mapping, Sequence
from functools import cached_property

import torch
from torch import Tensor

from moellava.model.loaded_model import LoadedModel

YES_NO = ("yes", "no")


class OptionTokens:
    """Finds the tokens that an answer of each option can begin with.

    An option counts in lower case, capitalised and in capitals. Options that begin with the same
    token cannot be told apart at the first position: they have no shares.
    """

    def __init__(self, loaded: LoadedModel):
        self._loaded = loaded
        self._known: dict[tuple[str, ...], list[list[int]] | None] = {}

    def shares(self, logits: Tensor, options: Sequence[str]) -> Mapping[str, float] | None:
        """The probability of each option among the options; they sum to 1.

        Args:
            logits: (V,) of the answer's first position.
        """
        names = tuple(options)
        if len(names) < 2:
            return None
        if names not in self._known:
            self._known[names] = self._first_tokens(names)
        tokens = self._known[names]
        if tokens is None:
            return None
        summed = torch.stack([torch.logsumexp(logits[ids], dim=0) for ids in tokens])
        shares = torch.softmax(summed.double(), dim=0).tolist()
        return dict(zip(names, shares, strict=True))

    def _first_tokens(self, options: Sequence[str]) -> list[list[int]] | None:
        found = [
            {
                self._first_token(text)
                for text in (option.lower(), option.capitalize(), option.upper())
            }
            for option in options
        ]
        if sum(map(len, found)) != len(set().union(*found)):
            return None
        return [sorted(ids) for ids in found]

    def _first_token(self, text: str) -> int:
        """The first token of a text that stands where the answer does, white space included."""
        tokenizer, before = self._loaded.tokenizer, self._prompt
        prompt_ids = list(tokenizer(before)["input_ids"])
        ids = list(tokenizer(before + text)["input_ids"])
        if ids[: len(prompt_ids)] == prompt_ids and len(ids) > len(prompt_ids):
            return int(ids[len(prompt_ids)])
        return int(tokenizer(text, add_special_tokens=False)["input_ids"][0])

    @cached_property
    def _prompt(self) -> str:
        conversation = [{"role": "user", "content": [{"type": "text", "text": "?"}]}]
        prompt: str = self._loaded.processor.apply_chat_template(
            conversation, add_generation_prompt=True, tokenize=False
        )
        return prompt
