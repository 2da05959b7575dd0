"""moellava's models in LLaMA-Factory, which has no hook for plug-ins: this file runs it.

    moellava integrations llama-factory > moellava_factory.py
    python moellava_factory.py train --model_name_or_path runs/2/model --template moellava ...

Prompts and labels are those of the chat template that was saved with the model.
"""

import sys
from collections.abc import Sequence
from copy import deepcopy
from dataclasses import dataclass
from typing import Any

from llamafactory.data.mm_plugin import BasePlugin, get_mm_plugin, register_mm_plugin
from llamafactory.data.template import Template, register_template
from llamafactory.extras.constants import IMAGE_PLACEHOLDER
from llamafactory.launcher import launch
from llamafactory.model.model_utils.visual import _register_composite_model

from moellava.data.chat_labels import tokenize_chat
from moellava.data.collate import resolve_chat_template
from moellava.images import load_image
from moellava.model.processing_moellava import MoeLlavaProcessor

NAME = "moellava"
_DUMMY = "."  # an answer that is not there yet


@dataclass
class MoeLlavaPlugin(BasePlugin):  # type: ignore[misc]  # no types without the package
    """Opens images as `moellava` does; remembers the processor for the template."""

    processor: Any = None

    def process_messages(
        self,
        messages: Sequence[dict[str, str]],
        images: Sequence[Any],
        videos: Sequence[Any],
        audios: Sequence[Any],
        processor: MoeLlavaProcessor | None,
    ) -> list[dict[str, str]]:
        """The messages with all placeholders of each image."""
        self._validate_input(processor, images, videos, audios)
        self._validate_messages(messages, images, videos, audios)
        if processor is None or processor.tiling is not None:
            raise ValueError("This file takes a moellava model without tiling.")
        self.processor = processor
        found = deepcopy(list(messages))
        for message in found:
            places = processor.image_token * processor.num_image_tokens
            message["content"] = message["content"].replace(IMAGE_PLACEHOLDER, places)
        return found

    def _get_mm_inputs(
        self, images: Sequence[Any], videos: object, audios: object, processor: Any, **_: object
    ) -> dict[str, Any]:
        if not images:
            return {}
        return {"pixel_values": processor.pixel_values([load_image(one) for one in images])}


class MoeLlavaTemplate(Template):  # type: ignore[misc]  # no types without the package
    """Encodes conversations as `moellava train` does, by the model's own chat template."""

    def _encode(
        self,
        tokenizer: Any,
        messages: Sequence[dict[str, str]],
        system: str | None,
        tools: str | None,
    ) -> list[list[int]]:
        """Token ids of each turn; white space behind an answer begins the next turn."""
        if tools:
            raise ValueError("moellava's chat templates have no tools. Leave them out.")
        processor = self.mm_plugin.processor
        places = processor.image_token * processor.num_image_tokens
        chat: list[dict[str, Any]] = [{"role": "system", "content": system}] if system else []
        for message in messages:
            texts = (message["content"] or _DUMMY).split(places)
            items: list[dict[str, Any]] = []
            for number, text in enumerate(texts):
                items += [{"type": "image"}] * (number > 0)
                # The templates write a newline behind each image themselves.
                text = text.removeprefix("\n") if number else text
                items += [{"type": "text", "text": text}] * bool(text)
            chat.append({"role": message["role"], "content": items})
        template = resolve_chat_template(processor, None)
        turns: list[list[int]] = [[]]
        for token, is_answer in zip(*tokenize_chat(chat, processor, template), strict=True):
            if is_answer != (len(turns) % 2 == 0):
                turns.append([])
            turns[-1].append(token)
        return turns[: len(messages)]


register_mm_plugin(NAME, MoeLlavaPlugin)
register_template(
    NAME,
    mm_plugin=get_mm_plugin(NAME, image_token=IMAGE_PLACEHOLDER),
    template_class=MoeLlavaTemplate,
)
_register_composite_model(NAME)

if __name__ == "__main__":
    sys.exit(launch())
