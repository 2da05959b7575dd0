"""What `load_pretrained_model` returns: the four parts that users unpack, and `answer`."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from io import IOBase
from typing import Any, Literal, overload

from transformers import BaseImageProcessor, BatchFeature, PreTrainedTokenizerBase
from typing_extensions import Unpack

import moellava
from moellava.images import PART_OPTIONS, ImageLike, Images
from moellava.model.conversation import generation_options, stream_chat
from moellava.model.generation import generate_texts, require_generation_options
from moellava.model.modeling_moellava import MoeLlavaForConditionalGeneration
from moellava.model.processing_moellava import MoeLlavaProcessor
from moellava.model.publish.model_card import PushOptions, push_to_hub
from moellava.model.quantization import num_weights
from moellava.model.turns import Message, as_list, is_conversation, not_a_question, with_images


@dataclass(frozen=True, repr=False)
class LoadedModel:
    """A model that is ready to use, and the processor of its inputs.

    It unpacks into four: `model, image_processor, tokenizer, context_len = loaded`.
    """

    model: MoeLlavaForConditionalGeneration
    processor: MoeLlavaProcessor

    @property
    def image_processor(self) -> BaseImageProcessor:
        processor: BaseImageProcessor = self.processor.image_processor
        return processor

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        tokenizer: PreTrainedTokenizerBase = self.processor.tokenizer
        return tokenizer

    @property
    def context_len(self) -> int:
        """How many tokens a prompt and its answer may have together."""
        length: int = self.model.config.get_text_config().max_position_embeddings
        return length

    def _four(self) -> tuple[object, ...]:
        return self.model, self.image_processor, self.tokenizer, self.context_len

    def __iter__(self) -> Iterator[Any]:
        return iter(self._four())

    def __len__(self) -> int:
        return len(self._four())

    def __getitem__(self, index: int) -> Any:
        return self._four()[index]

    def __repr__(self) -> str:
        config = self.model.config
        parts = (config.vision_config.tower, config.projector_type, config.language_model)
        names = " + ".join(name or "unnamed" for name in parts)
        size = f"{num_weights(self.model) / 1e6:,.1f} M parameters"
        return f"LoadedModel({names}: {size}, {self.model.dtype}, {self.model.device})"

    def push_to_hub(self, repo_id: str, **options: Unpack[PushOptions]) -> str:
        """Upload model, processor and card to the hub in one commit; returns the commit's URL.

        Options are those of `moellava.model.publish.model_card.push_to_hub`.
        """
        return push_to_hub(self.model, repo_id, processor=self.processor, **options)

    def answer(
        self,
        images: "ImageLike | Sequence[Any] | None",
        questions: str | Sequence[Any],
        **options: Any,
    ) -> list[str]:
        """Answer questions about images, as one batch.

        Args:
            images: for one question, its image, a list of its images, or None. For a list of
                questions, a list of such items, one per question; a single image serves all. An
                image is a path, a PIL image, an array, a tensor, encoded bytes, an open file, or
                what pydicom and nibabel read; with `slices`, the folder of a DICOM series, too.
            questions: a string or a list of strings. In place of a string, a conversation: chat
                messages with `role` and `content`, whose last turn is answered; an image item may
                have a `window` and so on of its own.
            **options: `window`, `frame`, `slices` and the other options of
                `moellava.images.PartOptions` say how images are seen; all others are passed to
                `generate`, by default greedy with at most 64 new tokens.

        Returns:
            One answer per question: the new text only, without special tokens.

        Raises:
            ValueError: if images and questions differ in number, or a prompt is longer than the
                context.
            TypeError: for an option that neither images nor `generate` have, and for something
                that is not an image or a question.
        """
        view: Any = {name: options[name] for name in PART_OPTIONS if name in options}
        generation = {name: value for name, value in options.items() if name not in view}
        require_generation_options(generation)
        single = isinstance(questions, str) or is_conversation(questions)
        if not single and not isinstance(questions, list | tuple):
            raise not_a_question(questions)
        asked = [questions] if single else list(questions)
        if not asked:
            return []
        images = _without_files(images)
        turns = [
            with_images(question, as_list(item), view)
            for question, item in zip(asked, _pair_images(images, len(asked), single), strict=True)
        ]
        prompts = self.processor.apply_chat_template(
            [messages for messages, _ in turns], add_generation_prompt=True, tokenize=False
        )
        pictures = [picture for _, own in turns for picture in own]
        inputs = self.processor(
            text=prompts,
            images=pictures or None,
            padding=True,
            padding_side="left",
            return_tensors="pt",
        ).to(self.model.device)

        self._require_room(inputs, generation.get("max_new_tokens") or 64)
        options = generation_options(self, generation)
        return generate_texts(self.model, self.tokenizer, inputs, **options)

    @overload
    def chat(
        self, messages: Iterable[Message], stream: Literal[False] = False, **generation: Any
    ) -> str: ...
    @overload
    def chat(
        self, messages: Iterable[Message], stream: Literal[True], **generation: Any
    ) -> Iterator[str]: ...
    def chat(
        self, messages: Iterable[Message], stream: bool = False, **generation: Any
    ) -> str | Iterator[str]:
        """The answer to the last of several messages, whole or, with `stream=True`, in pieces.

        Args:
            messages: `{"role": "user", "content": ...}` and so on; content is a string or a list of
                `{"type": "text", "text": ...}` and `{"type": "image", "image": ...}`.
            **generation: passed to `generate`; by default greedy, at most 64 new tokens.
        """
        pieces = self.stream(messages, **generation)
        return pieces if stream else "".join(pieces)

    def stream(self, messages: Iterable[Message], **generation: Any) -> Iterator[str]:
        """The pieces of the answer to the last message; `Conversation` is for many turns."""
        return stream_chat(self, messages, **generation)

    def explain(
        self, images: "Images | None", question: str | Sequence[Message], **options: Any
    ) -> "moellava.explain.Explanation":
        """What the model looked at and which experts worked while it answered a question.

        Options, errors and what comes back are those of `moellava.explain.explain`.
        """
        # That room looks into this one, and imports point downwards only: it is reached as users
        # reach it, through the package's public names.
        return moellava.explain.explain(self, images, question, **options)

    def _require_room(self, inputs: BatchFeature, max_new_tokens: int) -> None:
        """Raise `ValueError` if a prompt and its answer do not fit into the context."""
        num_tokens = inputs["attention_mask"].sum(dim=1)  # (B,)
        row = int(num_tokens.argmax())
        num_all = int(num_tokens[row])
        excess = num_all + max_new_tokens - self.context_len
        if excess > 0:
            num_image = int((inputs["input_ids"][row] == self.processor.image_token_id).sum())
            raise ValueError(
                f"Prompt {row + 1} has {num_all} tokens ({num_image} of images, "
                f"{num_all - num_image} of text) and max_new_tokens is {max_new_tokens}, but the "
                f"context holds {self.context_len}: {excess} tokens would be cut. Shorten the "
                "question, pass fewer images or tiles, or lower max_new_tokens."
            )


def _pair_images(images: Any, num_questions: int, single: bool) -> Sequence[Any]:
    if single:
        return [images]
    if images is None or not isinstance(images, list | tuple):
        return [images] * num_questions
    if len(images) != num_questions:
        raise ValueError(
            f"{len(images)} images for {num_questions} questions. Give one item per question (an "
            "image, a list of images, or None), or a single image for all of them."
        )
    return images


def _without_files(images: Any) -> Any:
    """Open files as their bytes: several questions may be asked about one."""
    if isinstance(images, list | tuple):
        return [_without_files(image) for image in images]
    return images.read() if isinstance(images, IOBase) else images
