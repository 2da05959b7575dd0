"""Questions in, answers of a model out: `Asker`, which encodes each image once.

Letters: B questions of a batch, T positions, V vocabulary.
"""

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from transformers import LogitsProcessor, StoppingCriteria
from transformers.modeling_outputs import BaseModelOutputWithPooling

from moellava.data.rows import Row, Turn
from moellava.eval.option_tokens import OptionTokens
from moellava.model.chat_templates import has_beginning
from moellava.model.conversation import generation_options
from moellava.model.generation import generate_texts
from moellava.model.loaded_model import LoadedModel
from moellava.model.tiling import Layout

# Questions whose images are kept at a time, in batches: long enough to find others of one length.
_BATCHES_IN_WINDOW = 16

LoadImage = Callable[[str], Image.Image]
Messages = list[dict[str, object]]


@dataclass(frozen=True, kw_only=True)
class Asked:
    """What a model is asked.

    Args:
        id: of the question.
        turns: the conversation, with as many `<image>` marks as images.
        images: the names of the images, which `load_image` knows.
        options: whose probabilities are wanted; empty for none.
    """

    id: str
    turns: tuple[Turn, ...]
    images: tuple[str, ...]
    options: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Answered:
    """An answer; `seconds` is its share of its batch's time."""

    id: str
    text: str
    num_tokens: int
    is_cut: bool
    seconds: float
    probabilities: Mapping[str, float] | None


class Asker:
    """Asks a model many questions, greedily, in batches of one length.

    Questions about the same image are asked near each other, so that it is encoded once; within a
    window of batches they are sorted by length, so that little is padded. In float32 neither
    changes an answer.

    Args:
        load_image: the picture of a name in `Asked.images`.
    """

    def __init__(
        self,
        loaded: LoadedModel,
        load_image: LoadImage,
        *,
        max_new_tokens: int = 64,
        batch_size: int = 8,
    ):
        self.loaded, self.load_image = loaded, load_image
        self.max_new_tokens, self.batch_size = max_new_tokens, batch_size
        self._option_tokens = OptionTokens(loaded)
        self._features: dict[str, list[Tensor]] = {}  # the embeddings of each mark
        self._layouts: dict[str, Layout] = {}

    def check(self, asked: Sequence[Asked]) -> None:
        """Raise `ValueError` if a prompt and its answer do not fit into the context."""
        for question in asked:
            num_tokens = len(self.prompt_ids(question))
            excess = num_tokens + self.max_new_tokens - self.loaded.context_len
            if excess > 0:
                raise ValueError(
                    f"The question of row {question.id!r} has {num_tokens} tokens and "
                    f"max_new_tokens is {self.max_new_tokens}, but the context holds "
                    f"{self.loaded.context_len}: {excess} tokens would be cut. Lower "
                    "max_new_tokens, or leave the row out."
                )

    def ask(self, asked: Sequence[Asked]) -> Iterator[list[Answered]]:
        """Answer all questions, a batch at a time, not in their order."""
        ordered = _by_image(asked)
        window_size = self.batch_size * _BATCHES_IN_WINDOW
        was_training = self.loaded.model.training
        self.loaded.model.eval()  # type: ignore[no-untyped-call]  # transformers declares none
        try:
            for start in range(0, len(ordered), window_size):
                yield from self._ask_window(ordered[start : start + window_size])
        finally:
            self._features.clear()
            self.loaded.model.train(was_training)

    def _ask_window(self, window: Sequence[Asked]) -> Iterator[list[Answered]]:
        began = time.perf_counter()
        self._encode(window)
        encoding = (time.perf_counter() - began) / len(window)
        with_ids = [(self.prompt_ids(question), question) for question in window]
        with_ids.sort(key=lambda pair: -len(pair[0]))  # a batch that is too large fails at once
        for start in range(0, len(with_ids), self.batch_size):
            yield self._ask_batch(with_ids[start : start + self.batch_size], encoding)

    @torch.inference_mode()
    def _encode(self, window: Sequence[Asked]) -> None:
        """Keep the image embeddings of this window's images, and of no others."""
        names = list(dict.fromkeys(name for question in window for name in question.images))
        self._features = {name: self._features[name] for name in names if name in self._features}
        missing = [name for name in names if name not in self._features]
        for start in range(0, len(missing), self.batch_size):
            part = missing[start : start + self.batch_size]
            pictures = [self.load_image(name) for name in part]
            inputs = self.loaded.processor.image_inputs(pictures)
            outputs = self.loaded.model.get_image_features(
                **{key: value.to(self.loaded.model.device) for key, value in inputs.items()},
                return_dict=True,
            )
            embeds: Any = outputs.pooler_output  # a list, which transformers declares a tensor
            of_marks = iter(embeds)
            for name, picture in zip(part, pictures, strict=True):
                num_marks = self.loaded.processor.layout(picture.size).num_marks
                self._features[name] = [next(of_marks) for _ in range(num_marks)]

    def _ask_batch(
        self, batch: Sequence[tuple[list[int], Asked]], encoding: float
    ) -> list[Answered]:
        began = time.perf_counter()
        tokenizer, device = self.loaded.tokenizer, self.loaded.model.device
        padded = tokenizer.pad(
            {"input_ids": [ids for ids, _ in batch]}, padding_side="left", return_tensors="pt"
        ).to(device)
        inputs: dict[str, object] = dict(padded)
        embeds = [
            view
            for _, question in batch
            for name in question.images
            for view in self._features[name]
        ]
        if embeds:
            image: Any = embeds  # transformers declares a tensor, and takes a list
            inputs["mm_encoder_outputs"] = {
                "image": BaseModelOutputWithPooling(pooler_output=image)
            }
        watch, first = _NewTokens(), _FirstLogits()
        options = generation_options(self.loaded, {"max_new_tokens": self.max_new_tokens})
        texts = generate_texts(
            self.loaded.model,
            tokenizer,
            inputs,
            stopping_criteria=[watch],
            logits_processor=[first],
            **options,
        )
        num_tokens, is_cut = watch.lengths(padded["input_ids"].shape[1], self._end_ids(options))
        seconds = encoding + (time.perf_counter() - began) / len(batch)
        return [
            Answered(
                id=question.id,
                text=text,
                num_tokens=num_tokens[row],
                is_cut=is_cut[row],
                seconds=round(seconds, 6),
                probabilities=self._option_tokens.shares(first.logits[row], question.options),
            )
            for row, ((_, question), text) in enumerate(zip(batch, texts, strict=True))
        ]

    def prompt_ids(self, question: Asked) -> list[int]:
        """The prompt's token ids, each image as its placeholders, as the processor writes them."""
        processor = self.loaded.processor
        prompt: str = processor.apply_chat_template(
            _messages(question), add_generation_prompt=True, tokenize=False
        )
        parts = prompt.split(processor.image_token)
        layouts = [self._layout(name) for name in question.images]
        places = [processor.placeholders(layout) for layout in layouts]
        text = "".join(part + place for part, place in zip(parts, [*places, ""], strict=True))
        tokenizer = self.loaded.tokenizer
        is_begun = has_beginning(tokenizer, text)
        # Too long a prompt is an error of `check`, not a warning of the tokenizer.
        encoded = tokenizer(text, add_special_tokens=not is_begun, verbose=False)
        return list(encoded["input_ids"])

    def _layout(self, name: str) -> Layout:
        """What stands for an image; with tiling, it is opened once to know its size."""
        if self.loaded.processor.tiling is None:
            return self.loaded.processor.layout((1, 1))
        if name not in self._layouts:
            self._layouts[name] = self.loaded.processor.layout(self.load_image(name).size)
        return self._layouts[name]

    def _end_ids(self, options: Mapping[str, Any]) -> list[int]:
        found = options.get("eos_token_id") or self.loaded.model.generation_config.eos_token_id
        return [] if found is None else [found] if isinstance(found, int) else list(found)


class _NewTokens(StoppingCriteria):
    """Stops nothing; keeps what was generated, ids that the text no longer shows included."""

    def __init__(self) -> None:
        self.ids: Tensor | None = None  # (B, T + new)

    def __call__(self, input_ids: Tensor, scores: object, **kwargs: object) -> Tensor:
        self.ids = input_ids
        return torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)

    def lengths(self, num_prompt: int, end_ids: Sequence[int]) -> tuple[list[int], list[bool]]:
        """Tokens of each answer before its end, and whether it has no end."""
        assert self.ids is not None  # generate calls it for every token
        new = self.ids[:, num_prompt:]
        ends = torch.isin(new, torch.tensor(end_ids, device=new.device))  # (B, new)
        has_end = ends.any(dim=1)
        first = ends.int().argmax(dim=1)
        lengths = torch.where(has_end, first, new.shape[1])
        return lengths.tolist(), (~has_end).tolist()


class _FirstLogits(LogitsProcessor):
    """Changes nothing; keeps the logits (B, V) of the answer's first position."""

    def __init__(self) -> None:
        self._first: Tensor | None = None

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        if self._first is None:
            self._first = scores.float()
        return scores

    @property
    def logits(self) -> Tensor:
        assert self._first is not None  # generate calls it for every token
        return self._first


def _by_image(asked: Sequence[Asked]) -> list[Asked]:
    """Questions about the same images next to each other, in the order of their first question."""
    place: dict[tuple[str, ...], int] = {}
    for question in asked:
        place.setdefault(question.images, len(place))
    return sorted(asked, key=lambda question: place[question.images])


def _messages(question: Asked) -> Messages:
    """The conversation for a chat template, each image as its place alone."""
    row = Row(id=question.id, images=question.images, turns=question.turns)
    messages: Messages = []
    for message in row.messages():
        content = message["content"]
        if isinstance(content, list):
            content = [{"type": "image"} if item["type"] == "image" else item for item in content]
        messages.append({"role": message["role"], "content": content})
    return messages
