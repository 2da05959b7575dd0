"""What `load_pretrained_model` returns: the four parts that users unpack, and `answer`."""

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from PIL import Image
from transformers import PreTrainedTokenizerBase

from moellava.images import to_pil
from moellava.model.conversation import Message, stream_chat
from moellava.model.generation import generate_texts
from moellava.model.modeling_moellava import MoeLlavaForConditionalGeneration
from moellava.model.processing_moellava import MoeLlavaProcessor

ImageLike = Image.Image | str | Path
# One image, several images of one prompt, or None for a prompt without an image.
ImagesOfPrompt = ImageLike | Sequence[ImageLike] | None


class _Parts(NamedTuple):
    model: MoeLlavaForConditionalGeneration
    image_processor: Any
    tokenizer: PreTrainedTokenizerBase
    context_len: int


class LoadedModel(_Parts):
    """`model, image_processor, tokenizer, context_len`, in this order, with `processor` and `answer` besides."""

    processor: MoeLlavaProcessor

    def __new__(
        cls, model: MoeLlavaForConditionalGeneration, processor: MoeLlavaProcessor
    ) -> "LoadedModel":
        context_len = model.config.get_text_config().max_position_embeddings
        loaded = super().__new__(
            cls, model, processor.image_processor, processor.tokenizer, context_len
        )
        loaded.processor = processor
        return loaded

    def answer(
        self,
        images: ImagesOfPrompt | Sequence[ImagesOfPrompt],
        questions: str | Sequence[str],
        **generation: Any,
    ) -> list[str]:
        """Answer questions about images, as one batch.

        Args:
            images: for one question, its image, a list of its images, or None. For a list of questions, a list
                of such items, one per question; a single image serves all questions.
            questions: a string or a list of strings.
            **generation: passed to `generate`; by default greedy, at most 64 new tokens.

        Returns:
            One answer per question: the new text only, without special tokens.

        Raises:
            ValueError: if there are not as many images as questions, or a prompt is longer than the context.
        """
        single = isinstance(questions, str)
        questions = [questions] if isinstance(questions, str) else list(questions)
        per_prompt = [_as_list(item) for item in _pair_images(images, len(questions), single)]
        conversations: Any = [
            [
                {
                    "role": "user",
                    "content": [
                        *({"type": "image"} for _ in own),
                        {"type": "text", "text": question},
                    ],
                }
            ]
            for own, question in zip(per_prompt, questions, strict=True)
        ]
        prompts = self.processor.apply_chat_template(
            conversations, add_generation_prompt=True, tokenize=False
        )
        pictures = [to_pil(image) for own in per_prompt for image in own]
        inputs = self.processor(
            text=prompts,
            images=pictures or None,
            padding=True,
            padding_side="left",
            return_tensors="pt",
        ).to(self.model.device)

        self._require_room(inputs, generation.get("max_new_tokens", 64))
        return generate_texts(self.model, self.tokenizer, inputs, **generation)

    def chat(self, messages: Iterable[Message], stream: bool = False, **generation: Any) -> Any:
        """The answer to the last of several messages, whole or, with `stream=True`, in pieces.

        Args:
            messages: `{"role": "user", "content": ...}` and so on; content is a string or a list of
                `{"type": "text", "text": ...}` and `{"type": "image", "image": ...}`.
            **generation: passed to `generate`; by default greedy, at most 64 new tokens.
        """
        pieces = self.stream(messages, **generation)
        return pieces if stream else "".join(pieces)

    def stream(self, messages: Iterable[Message], **generation: Any) -> Iterator[str]:
        """The pieces of text of the answer to the last message; see `Conversation` for many turns."""
        return stream_chat(self, messages, **generation)

    def _require_room(self, inputs: Any, max_new_tokens: int) -> None:
        """Raise `ValueError` where a prompt and its answer do not fit into the context; what is too much is counted."""
        num_tokens = inputs["attention_mask"].sum(dim=1)  # (B,)
        row = int(num_tokens.argmax())
        excess = int(num_tokens[row]) + max_new_tokens - self.context_len
        if excess > 0:
            num_image = int((inputs["input_ids"][row] == self.processor.image_token_id).sum())
            raise ValueError(
                f"Prompt {row + 1} has {int(num_tokens[row])} tokens ({num_image} of images, "
                f"{int(num_tokens[row]) - num_image} of text) and max_new_tokens is {max_new_tokens}, but the context "
                f"holds {self.context_len}: {excess} tokens would be cut. Shorten the question, pass fewer images per "
                "prompt, or lower max_new_tokens."
            )


def _pair_images(images: Any, num_questions: int, single: bool) -> list[ImagesOfPrompt]:
    if single:
        return [images]
    if images is None or isinstance(images, ImageLike):
        return [images] * num_questions
    if len(images) != num_questions:
        raise ValueError(
            f"{len(images)} images for {num_questions} questions. Give one item per question (an image, a list of "
            "images, or None), or a single image for all of them."
        )
    return list(images)


def _as_list(item: ImagesOfPrompt) -> list[ImageLike]:
    if item is None:
        return []
    return [item] if isinstance(item, ImageLike) else list(item)
