"""Turns → the prompt: token ids with the places of its pictures, and their embeddings.

| name | gives |
|---|---|
| `write_prompt` | the `Prompt` of turns, up to where the next answer begins |
| `encode_pictures`, `image_inputs` | its pictures' embeddings, for the model |
| `require_question`, `require_prompt_room` | errors for what cannot be answered |
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol, cast

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase
from transformers.modeling_outputs import BaseModelOutputWithPooling

from moellava.model.chat_templates import has_beginning
from moellava.model.generation import require_room
from moellava.model.modeling_moellava import MoeLlavaForConditionalGeneration
from moellava.model.processing_moellava import MoeLlavaProcessor
from moellava.model.turns import Picture, Turn


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


@dataclass
class Prompt:
    """Token ids, and the same with the picture's own number in place of each placeholder."""

    ids: list[int]
    keys: list[object]
    pictures: list[Picture]


def write_prompt(processor: MoeLlavaProcessor, turns: Sequence[Turn]) -> Prompt:
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
    return Prompt(ids, _keys(ids, pictures, processor.image_token_id), pictures)


def _keys(ids: Sequence[int], pictures: Sequence[Picture], image_token_id: int) -> list[object]:
    """The ids, with the picture in place of its tokens and of what stands between its tiles."""
    keys: list[object] = []
    rest, picture, num_left = iter(pictures), None, 0
    for token in ids:
        if token == image_token_id and num_left == 0:
            picture = next(rest)
            num_left = picture.layout.num_tokens
        keys.append(picture if num_left else token)
        num_left -= token == image_token_id
    return keys


@torch.inference_mode()
def encode_pictures(model: MoeLlavaForConditionalGeneration, pictures: Sequence[Picture]) -> None:
    """Fill in the embeddings of the pictures that have none yet."""
    new = [picture for picture in dict.fromkeys(pictures) if picture.embeds is None]
    if not new:
        return
    inputs = {
        name: torch.cat([picture.inputs[name] for picture in new]).to(model.device)
        for name in new[0].inputs
    }
    embeds = model.get_image_features(**inputs, return_dict=True).pooler_output
    of_marks = iter(cast(list[Tensor], embeds))
    for picture in new:
        picture.embeds = [next(of_marks) for _ in range(picture.layout.num_marks)]


def count_tokens(loaded: ChatModel, turns: Sequence[Turn]) -> int:
    """The tokens of the prompt for the next answer."""
    return len(write_prompt(loaded.processor, turns).ids)


def require_question(turns: Sequence[Turn]) -> None:
    """Raise `ValueError` if the last turn is not one to answer."""
    if not turns or turns[-1].role != "user":
        raise ValueError("The last message is not the user's. Add a question first.")


def require_prompt_room(loaded: ChatModel, prompt: Prompt, max_new_tokens: int, what: str) -> None:
    """`moellava.model.generation.require_room` for a prompt."""
    num_image_tokens = sum(picture.layout.num_tokens for picture in prompt.pictures)
    require_room(len(prompt.ids), num_image_tokens, max_new_tokens, loaded.context_len, what)


def require_chat_template(processor: MoeLlavaProcessor) -> None:
    """Raise `ValueError` for a checkpoint that does not say how a conversation is written."""
    if not processor.chat_template:
        raise ValueError(
            "The checkpoint has no chat template, so it is not known how questions are written to "
            "its model. Add chat_template.jinja, as its training wrote them, to its folder."
        )


def image_inputs(pictures: Sequence[Picture]) -> dict[str, Any]:
    if not pictures:
        return {}
    embeds: Any = [view for picture in pictures for view in picture.embeds or ()]
    return {"mm_encoder_outputs": {"image": BaseModelOutputWithPooling(pooler_output=embeds)}}


def pictures_after(prompt: Prompt, num_kept: int) -> list[Picture]:
    """The pictures of the tokens that are still to be run, in order."""
    rest = [key for key in prompt.keys[num_kept:] if isinstance(key, Picture)]
    return list(dict.fromkeys(rest))


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
