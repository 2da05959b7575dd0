"""Messages with text and images → answers, turn by turn, whole or as pieces of text.

| name | gives |
|---|---|
| `Conversation` | turns whose images are encoded once and whose cache is continued |
| `chat`, `stream_chat` | the answer to a list of messages |
| `answer_batch` | answers to several conversations at once |
"""

from collections.abc import Generator, Iterable, Iterator, Mapping, Sequence
from typing import Any, TypeAlias, cast

import torch
from transformers import DynamicCache

from moellava.model.generation import (
    GrowingAnswer,
    generate_answers,
    new_answer,
    require_generation_options,
    stream_pieces,
    turn_end_options,
)
from moellava.model.prompts import (
    ChatModel,
    Prompt,
    count_tokens,
    encode_pictures,
    image_inputs,
    pictures_after,
    require_prompt_room,
    require_question,
    write_prompt,
)
from moellava.model.turns import (
    Message,
    Picture,
    Turn,
    as_list,
    image_item,
    read_message,
    text_item,
)

Pieces: TypeAlias = Generator[str, None, None]


class Conversation:
    """Turns of user and model about images; what was computed for earlier turns is kept.

    The answer to each turn equals that of a fresh run over all turns: the kept cache is used for
    the tokens that the new prompt shares with it, and never for others.

    Args:
        loaded: what `load_pretrained_model` returns.
        system: the system prompt, if any.
    """

    def __init__(self, loaded: ChatModel, *, system: str | None = None) -> None:
        self._loaded = loaded
        self._turns: tuple[Turn, ...] = ()
        self._system = system
        self._cache: DynamicCache | None = None
        self._cached: list[object] = []  # the keys of the tokens in the cache
        self._is_answering = False
        self.reset()

    @property
    def turns(self) -> tuple[Turn, ...]:
        """All turns so far, the system prompt included."""
        return self._turns

    @property
    def num_tokens(self) -> int:
        """Tokens of the conversation so far, as the next prompt begins with them."""
        return count_tokens(self._loaded, self._turns) if self._turns else 0

    def reset(self) -> None:
        """Forget all turns but the system prompt."""
        self._require_idle()
        self._turns = ()
        self._forget()
        if self._system is not None:
            self.add({"role": "system", "content": self._system})

    def add(self, message: Message) -> None:
        """Append a message without answering it, such as a turn of an earlier conversation."""
        self._require_idle()
        self._turns = (*self._turns, read_message(self._loaded.processor, message))

    def undo(self) -> None:
        """Take the last question and its answer back."""
        self._require_idle()
        places = [place for place, turn in enumerate(self._turns) if turn.role == "user"]
        self._turns = self._turns[: places[-1]] if places else self._turns

    def copy(self) -> "Conversation":
        """Another conversation with the same turns, whose cache is computed anew."""
        self._require_idle()
        other = Conversation(self._loaded, system=self._system)
        other._turns = self._turns
        return other

    def ask(self, text: str, images: object = (), **generation: object) -> str:
        """The answer to a question about new or earlier images.

        Args:
            text: the question.
            images: an image or a list of them: anything that `moellava.images.to_pil` takes, or
                `{"image": ..., "window": "lung", ...}` with `moellava.images.PartOptions`, such as
                `{"image": "ct_folder", "slices": 8}`.
            **generation: passed to `generate`; by default greedy, at most 64 new tokens.

        Raises:
            ValueError: an unreadable image, or more tokens than the context holds; the conversation
                is then as it was before.
        """
        return "".join(self.stream(text, images, **generation))

    def stream(self, text: str, images: object = (), **generation: object) -> Pieces:
        """As `ask`, in pieces.

        Leaving the loop early, or `close()`, stops the answer, and keeps what came.
        """
        items = [*(image_item(image) for image in as_list(images)), text_item(text)]
        turn = read_message(self._loaded.processor, {"role": "user", "content": items})
        return self._start((*self._turns, turn), generation)

    def answer(self, **generation: object) -> Pieces:
        """The answer to the messages as they are, the last of which is the user's, in pieces."""
        return self._start(self._turns, generation)

    def _require_idle(self) -> None:
        if self._is_answering:
            raise ValueError("This conversation is being answered. Read or close the stream first.")

    def _start(self, turns: tuple[Turn, ...], generation: Mapping[str, object]) -> Pieces:
        self._require_idle()
        require_question(turns)
        require_generation_options(generation)
        if generation.get("num_return_sequences", 1) != 1:
            raise ValueError("A conversation has one answer. Leave num_return_sequences out.")
        loaded = self._loaded
        options = generation_options(loaded, generation)
        answer = new_answer(loaded.model, loaded.tokenizer, options)
        prompt = write_prompt(loaded.processor, turns)
        require_prompt_room(loaded, prompt, answer.max_new_tokens, "The conversation")
        encode_pictures(loaded.model, prompt.pictures)
        pieces = stream_pieces(answer, lambda: self._generate(answer, prompt, options))
        return self._follow(answer, pieces, self._turns, turns)

    def _follow(
        self,
        answer: GrowingAnswer,
        pieces: Iterator[str],
        before: tuple[Turn, ...],
        turns: tuple[Turn, ...],
    ) -> Pieces:
        self._require_idle()
        if self._turns is not before:
            raise ValueError("The conversation has changed since this answer was asked for.")
        self._turns, self._is_answering = turns, True
        try:
            yield from pieces
        except Exception:
            self._turns = before
            raise
        finally:
            self._is_answering = False
            if answer.finish_reason is not None and self._turns is turns:
                self._turns = (*turns, Turn("assistant", (answer.text,)))

    def _generate(self, answer: GrowingAnswer, prompt: Prompt, options: dict[str, Any]) -> None:
        """Continue from the tokens that the cache has, and keep what is computed."""
        model = self._loaded.model
        ids = torch.tensor([prompt.ids], device=model.device)
        inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        if _has_own_cache(options):
            self._forget()
            generate_answers(
                model, {**inputs, **image_inputs(prompt.pictures)}, [answer], **options
            )
            return
        cache, num_kept = self._cache_for(prompt)
        self._forget()  # until it is whole again
        images = image_inputs(pictures_after(prompt, num_kept))
        sequences = generate_answers(
            model, {**inputs, **images, "cache": cache}, [answer], **options
        )
        num_new = cache.get_seq_length() - len(prompt.ids)
        self._cached = [*prompt.keys, *sequences[0, len(prompt.ids) :][:num_new].tolist()]
        self._cache = cache

    def _cache_for(self, prompt: Prompt) -> tuple[DynamicCache, int]:
        """The cache cut to what it shares with the prompt, and the number of those tokens."""
        num_shared = _num_shared(self._cached, prompt.keys)
        # One token at least is run, and never a part of an image.
        num_shared = min(num_shared, len(prompt.keys) - 1)
        while num_shared and _is_within_image(prompt.keys, num_shared):
            num_shared -= 1
        cache = self._cache
        if cache is None or not num_shared or not _cut(cache, num_shared):
            return DynamicCache(config=self._loaded.model.config.get_text_config()), 0
        return cache, num_shared

    def _forget(self) -> None:
        self._cache, self._cached = None, []


def chat(loaded: ChatModel, messages: Iterable[Message], **generation: object) -> str:
    """The answer to the last message; see `stream_chat`."""
    return "".join(stream_chat(loaded, messages, **generation))


def stream_chat(
    loaded: ChatModel, messages: Iterable[Message], **generation: object
) -> Iterator[str]:
    """The answer to the last message, in pieces of text.

    Args:
        messages: `{"role": "user", "content": ...}` and so on; content is a string or a list of
            `{"type": "text", "text": ...}` and `{"type": "image", "image": ..., "window": "lung"}`.
        **generation: passed to `generate`; by default greedy, at most 64 new tokens.

    Raises:
        ValueError: a message that cannot be read, or more tokens than the context holds.
    """
    conversation = Conversation(loaded)
    for message in messages:
        conversation.add(message)
    return conversation.answer(**generation)


def answer_batch(
    loaded: ChatModel,
    conversations: Sequence[Sequence[Turn]],
    answers: Sequence[GrowingAnswer],
    *,
    top_logprobs: int | None = None,
    **generation: object,
) -> None:
    """Let each conversation's answer grow, all in one left-padded batch.

    Args:
        answers: one per conversation, from `start_answer`.
    """
    model, pad = loaded.model, loaded.tokenizer.pad_token_id
    prompts = [write_prompt(loaded.processor, turns) for turns in conversations]
    pictures = [picture for prompt in prompts for picture in prompt.pictures]
    encode_pictures(model, pictures)
    longest = max(len(prompt.ids) for prompt in prompts)
    rows = [[pad] * (longest - len(prompt.ids)) + prompt.ids for prompt in prompts]
    mask = [[0] * (longest - len(prompt.ids)) + [1] * len(prompt.ids) for prompt in prompts]
    inputs = {
        "input_ids": torch.tensor(rows, device=model.device),  # (B, T)
        "attention_mask": torch.tensor(mask, device=model.device),
        **image_inputs(pictures),
    }
    options = generation_options(loaded, generation)
    generate_answers(model, inputs, answers, top_logprobs=top_logprobs, **options)


def start_answer(
    loaded: ChatModel, turns: Sequence[Turn], **generation: object
) -> tuple[GrowingAnswer, int]:
    """An empty answer for `answer_batch`, and the tokens of its prompt.

    Raises:
        ValueError: no question, or more tokens than the context holds.
    """
    require_question(turns)
    options = generation_options(loaded, generation)
    answer = new_answer(loaded.model, loaded.tokenizer, options)
    prompt = write_prompt(loaded.processor, turns)
    require_prompt_room(loaded, prompt, answer.max_new_tokens, "The prompt")
    return answer, len(prompt.ids)


def generation_options(loaded: ChatModel, generation: Mapping[str, object]) -> dict[str, Any]:
    """The options for `generate`, with what ends a turn of the chat template."""
    template = loaded.processor.chat_template
    if isinstance(template, dict):
        template = template.get("default")
    ends = turn_end_options(loaded.model, loaded.tokenizer, template) if template else {}
    given = generation.get("stop_strings") or []
    own = [given] if isinstance(given, str) else list(cast(Iterable[str], given))
    options = {**ends, **generation}
    if own or "stop_strings" in ends:
        options["stop_strings"] = [*own, *ends.get("stop_strings", [])]
    return options


def _has_own_cache(options: Mapping[str, object]) -> bool:
    """Whether `generate` is asked for a cache of another kind, or of several rows."""
    is_plain = options.get("num_beams", 1) == 1 and options.get("use_cache", True)
    return not is_plain or options.get("cache_implementation") is not None


def _num_shared(cached: Sequence[object], wanted: Sequence[object]) -> int:
    """Length of the common beginning; a picture is only the same as itself."""
    for place, (old, new) in enumerate(zip(cached, wanted, strict=False)):
        if old != new:
            return place
    return min(len(cached), len(wanted))


def _is_within_image(keys: Sequence[object], place: int) -> bool:
    return isinstance(keys[place], Picture) and keys[place] is keys[place - 1]


def _cut(cache: DynamicCache, length: int) -> bool:
    """Cut the cache, and say whether that was possible: a sliding window has lost its beginning."""
    excess = cache.get_seq_length() - length
    if excess and any(cache.is_sliding):
        return False
    if excess:
        cache.crop(-excess)
    return True
