"""Messages with text and images → answers, turn by turn, whole or as pieces of text.

| name | gives |
|---|---|
| `Conversation` | turns whose images are encoded once and whose cache is continued |
| `chat`, `stream_chat` | the answer to a list of messages |
| `read_picture`, `Picture` | an image, prepared for the model once |
| `answer_batch` | answers to several conversations at once |
"""

from collections.abc import Generator, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol, TypeAlias, cast

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedTokenizerBase
from transformers.modeling_outputs import BaseModelOutputWithPooling

from moellava.images import ViewOptions, to_eight_bit, to_pil
from moellava.messages import unknown_name
from moellava.model.chat_templates import has_beginning
from moellava.model.generation import (
    GrowingAnswer,
    generate_answers,
    new_answer,
    require_generation_options,
    require_room,
    stream_pieces,
    turn_end_options,
)
from moellava.model.modeling_moellava import MoeLlavaForConditionalGeneration
from moellava.model.processing_moellava import MoeLlavaProcessor

ROLES = ("system", "user", "assistant")
VIEW_OPTIONS = tuple(ViewOptions.__annotations__)
# {"role": "user", "content": "..."}, or a list of items:
# {"type": "text", "text": "..."} and {"type": "image", "image": any image, "window": "lung"}.
Message: TypeAlias = Mapping[str, object]
Pieces: TypeAlias = Generator[str, None, None]


class ChatModel(Protocol):
    """What a conversation needs of a `LoadedModel`."""

    @property
    def model(self) -> MoeLlavaForConditionalGeneration: ...
    @property
    def processor(self) -> MoeLlavaProcessor: ...
    @property
    def tokenizer(self) -> PreTrainedTokenizerBase: ...
    @property
    def context_len(self) -> int: ...


@dataclass(eq=False)
class Picture:
    """An image as the model takes it; the embeddings are filled in when it is first asked about."""

    pixel_values: Tensor  # (V, 3, H, W), its views
    layout: str  # `MoeLlavaProcessor.layout`
    num_tokens: int  # of all placeholders
    name: str | None = None
    view: dict[str, object] = field(default_factory=dict)
    embeds: list[Tensor] | None = None  # (N, D_t) of each view


@dataclass(frozen=True)
class Turn:
    """One message: texts and pictures in the order in which they were given."""

    role: str
    content: tuple[str | Picture, ...]

    @property
    def pictures(self) -> list[Picture]:
        return [item for item in self.content if isinstance(item, Picture)]

    @property
    def text(self) -> str:
        return "".join(item for item in self.content if isinstance(item, str))


@dataclass
class _Prompt:
    """Token ids, and the same with the picture's own number in place of each placeholder."""

    ids: list[int]
    keys: list[object]
    pictures: list[Picture]


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
                `{"image": ..., "window": "lung", ...}` with the options of `moellava.images.View`.
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
        items = [*(_image_item(image) for image in _as_list(images)), _text_item(text)]
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

    def _generate(self, answer: GrowingAnswer, prompt: _Prompt, options: dict[str, Any]) -> None:
        """Continue from the tokens that the cache has, and keep what is computed."""
        model = self._loaded.model
        ids = torch.tensor([prompt.ids], device=model.device)
        inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        if _has_own_cache(options):
            self._forget()
            generate_answers(
                model, {**inputs, **_image_inputs(prompt.pictures)}, [answer], **options
            )
            return
        cache, num_kept = self._cache_for(prompt)
        self._forget()  # until it is whole again
        images = _image_inputs(_pictures_after(prompt, num_kept))
        sequences = generate_answers(
            model, {**inputs, **images, "cache": cache}, [answer], **options
        )
        num_new = cache.get_seq_length() - len(prompt.ids)
        self._cached = [*prompt.keys, *sequences[0, len(prompt.ids) :][:num_new].tolist()]
        self._cache = cache

    def _cache_for(self, prompt: _Prompt) -> tuple[DynamicCache, int]:
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
        **_image_inputs(pictures),
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


def count_tokens(loaded: ChatModel, turns: Sequence[Turn]) -> int:
    """The tokens of the prompt for the next answer."""
    return len(write_prompt(loaded.processor, turns).ids)


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


def require_question(turns: Sequence[Turn]) -> None:
    """Raise `ValueError` if the last turn is not one to answer."""
    if not turns or turns[-1].role != "user":
        raise ValueError("The last message is not the user's. Add a question first.")


def require_prompt_room(loaded: ChatModel, prompt: _Prompt, max_new_tokens: int, what: str) -> None:
    """`moellava.model.generation.require_room` for a prompt."""
    num_image_tokens = sum(picture.num_tokens for picture in prompt.pictures)
    require_room(len(prompt.ids), num_image_tokens, max_new_tokens, loaded.context_len, what)


def read_message(processor: MoeLlavaProcessor, message: Message) -> Turn:
    """A checked turn; images are read and preprocessed.

    Raises:
        ValueError: an unknown role, key or kind of item, an empty message, an unreadable image.
    """
    role, content = message.get("role"), message.get("content")
    if not isinstance(role, str) or role not in ROLES:
        raise unknown_name("role", _shortened(role).strip("'"), ROLES)
    if extra := [name for name in message if name not in ("role", "content")]:
        raise unknown_name("key of a message", extra[0], ("role", "content"))
    items = [_text_item(content)] if isinstance(content, str) else content
    if not isinstance(items, Sequence):
        raise ValueError(
            f"The content of a message is {_shortened(content)}; expected text or a list."
        )
    turn = Turn(role, tuple(_read_item(processor, item) for item in items))
    if role != "user" and turn.pictures:
        raise ValueError(f"A message of the role {role!r} holds an image; only the user's may.")
    if role == "user" and not turn.text.strip() and not turn.pictures:
        raise ValueError("The question is empty. Write one, or add an image.")
    return turn


def read_picture(processor: MoeLlavaProcessor, image: object, **view: Any) -> Picture:
    """An image of any kind, as the model takes it."""
    pil = to_eight_bit(to_pil(cast(Any, image), **view))
    layout = processor.layout(pil.size)
    num_tokens = layout.count(processor.image_token) * processor.num_image_tokens
    name = Path(image).name if isinstance(image, str | Path) else None
    return Picture(processor.pixel_values([pil]), layout, num_tokens, name, dict(view))


def write_prompt(processor: MoeLlavaProcessor, turns: Sequence[Turn]) -> _Prompt:
    """The token ids of a conversation, up to where the next answer begins.

    Raises:
        ValueError: the template refuses the turns, or a text holds the image token.
    """
    pictures = [picture for turn in turns for picture in turn.pictures]
    text = _render(processor, turns)
    parts = text.split(processor.image_token)
    if len(parts) - 1 != len(pictures):
        raise ValueError(
            f"The prompt has {len(parts) - 1} times {processor.image_token} for {len(pictures)} "
            f"images. Leave {processor.image_token} out of the text: images stand in the message."
        )
    runs = [processor.placeholders(picture.layout) for picture in pictures]
    whole = "".join(part + run for part, run in zip(parts, [*runs, ""], strict=True))
    is_begun = has_beginning(processor.tokenizer, whole)
    ids: list[int] = processor.tokenizer(
        whole,
        add_special_tokens=not is_begun,
        verbose=False,  # too long a prompt is an error of `require_prompt_room`
    )["input_ids"]
    return _Prompt(ids, _keys(ids, pictures, processor.image_token_id), pictures)


def _keys(ids: Sequence[int], pictures: Sequence[Picture], image_token_id: int) -> list[object]:
    """The ids, with the picture in place of its tokens and of what stands between its tiles."""
    keys: list[object] = []
    rest, picture, num_left = iter(pictures), None, 0
    for token in ids:
        if token == image_token_id and num_left == 0:
            picture = next(rest)
            num_left = picture.num_tokens
        keys.append(picture if num_left else token)
        num_left -= token == image_token_id
    return keys


@torch.inference_mode()
def encode_pictures(model: MoeLlavaForConditionalGeneration, pictures: Sequence[Picture]) -> None:
    """Fill in the embeddings of the pictures that have none yet."""
    new = [picture for picture in dict.fromkeys(pictures) if picture.embeds is None]
    if not new:
        return
    pixel_values = torch.cat([picture.pixel_values for picture in new]).to(model.device)
    embeds = model.get_image_features(pixel_values, return_dict=True).pooler_output
    views = iter(cast(list[Tensor], embeds))
    for picture in new:
        picture.embeds = [next(views) for _ in range(len(picture.pixel_values))]


def require_chat_template(processor: MoeLlavaProcessor) -> None:
    """Raise `ValueError` for a checkpoint that does not say how a conversation is written."""
    if not processor.chat_template:
        raise ValueError(
            "The checkpoint has no chat template, so it is not known how questions are written to "
            "its model. Add chat_template.jinja, as its training wrote them, to its folder."
        )


def _render(processor: MoeLlavaProcessor, turns: Sequence[Turn]) -> str:
    require_chat_template(processor)
    messages = [{"role": turn.role, "content": _template_content(turn)} for turn in turns]
    return str(processor.apply_chat_template(messages, add_generation_prompt=True, tokenize=False))


def _template_content(turn: Turn) -> str | list[dict[str, str]]:
    if turn.role != "user":
        return turn.text
    return [
        {"type": "text", "text": item} if isinstance(item, str) else {"type": "image"}
        for item in turn.content
    ]


def _read_item(processor: MoeLlavaProcessor, item: object) -> str | Picture:
    if not isinstance(item, Mapping) or item.get("type") not in ("text", "image"):
        raise ValueError(
            f"An item of a message is {_shortened(item)}; expected "
            '{"type": "text", "text": ...} or {"type": "image", "image": ...}.'
        )
    rest = {name: value for name, value in item.items() if name != "type"}
    known = ("text",) if item["type"] == "text" else ("image", *VIEW_OPTIONS)
    if extra := [name for name in rest if name not in known]:
        raise unknown_name(f"key of an item of type {item['type']!r}", str(extra[0]), known)
    if item["type"] == "text":
        if not isinstance(rest.get("text"), str):
            raise ValueError(f"The text of an item is {_shortened(rest.get('text'))}.")
        return cast(str, rest["text"])
    if rest.get("image") is None:
        raise ValueError('An item of type "image" has no "image".')
    return read_picture(processor, rest.pop("image"), **rest)


def _shortened(value: object, most: int = 80) -> str:
    """A value as the error names it; of objects such as a pydicom dataset only the type.

    Their text may hold what a file says of a patient.
    """
    if not isinstance(value, str | int | float | None):
        keys = f" with the keys {sorted(map(str, value))}" if isinstance(value, dict) else ""
        return f"a {type(value).__name__}{keys}"
    text = repr(value)
    return text if len(text) <= most else f"{text[:most]}..."


def _text_item(text: str) -> dict[str, object]:
    return {"type": "text", "text": text}


def _image_item(image: object) -> dict[str, object]:
    if isinstance(image, Mapping) and "image" in image:
        return {"type": "image", **image}
    return {"type": "image", "image": image}


def _as_list(images: object) -> list[object]:
    if images is None:
        return []
    return list(images) if isinstance(images, list | tuple) else [images]


def _image_inputs(pictures: Sequence[Picture]) -> dict[str, Any]:
    if not pictures:
        return {}
    embeds: Any = [view for picture in pictures for view in picture.embeds or ()]
    return {"mm_encoder_outputs": {"image": BaseModelOutputWithPooling(pooler_output=embeds)}}


def _has_own_cache(options: Mapping[str, object]) -> bool:
    """Whether `generate` is asked for a cache of another kind, or of several rows."""
    is_plain = options.get("num_beams", 1) == 1 and options.get("use_cache", True)
    return not is_plain or options.get("cache_implementation") is not None


def _pictures_after(prompt: _Prompt, num_kept: int) -> list[Picture]:
    """The pictures of the tokens that are still to be run, in order."""
    rest = [key for key in prompt.keys[num_kept:] if isinstance(key, Picture)]
    return list(dict.fromkeys(rest))


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
