"""What `load_pretrained_model` returns: the four parts that users unpack, and `answer`."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

from PIL import Image
from transformers import BaseImageProcessor, BatchFeature, PreTrainedTokenizerBase
from typing_extensions import Unpack

from moellava.images import to_pil
from moellava.model.generation import generate_texts
from moellava.model.modeling_moellava import MoeLlavaForConditionalGeneration
from moellava.model.processing_moellava import MoeLlavaProcessor
from moellava.model.publish.model_card import PushOptions, push_to_hub

ImageLike: TypeAlias = Image.Image | str | Path
# One image, several images of one prompt, or None for a prompt without an image.
ImagesOfPrompt: TypeAlias = ImageLike | Sequence[ImageLike] | None


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

    def _four(self) -> tuple[Any, ...]:
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
        size = f"{self.model.num_parameters() / 1e6:,.1f} M parameters"
        return f"LoadedModel({names}: {size}, {self.model.dtype}, {self.model.device})"

    def push_to_hub(self, repo_id: str, **options: Unpack[PushOptions]) -> str:
        """Upload model, processor and card to the hub in one commit; returns the commit's URL.

        Options are those of `moellava.model.publish.model_card.push_to_hub`.
        """
        return push_to_hub(self.model, repo_id, processor=self.processor, **options)

    def answer(
        self,
        images: ImagesOfPrompt | Sequence[ImagesOfPrompt],
        questions: str | Sequence[str],
        **generation: Any,
    ) -> list[str]:
        """Answer questions about images, as one batch.

        Args:
            images: for one question, its image, a list of its images, or None. For a list of
                questions, a list of such items, one per question; a single image serves all.
            questions: a string or a list of strings.
            **generation: passed to `generate`; by default greedy, at most 64 new tokens.

        Returns:
            One answer per question: the new text only, without special tokens.

        Raises:
            ValueError: if images and questions differ in number, or a prompt is longer than the
                context.
        """
        single = isinstance(questions, str)
        questions = [questions] if isinstance(questions, str) else list(questions)
        per_prompt = [_as_list(item) for item in _pair_images(images, len(questions), single)]
        prompts = self.processor.apply_chat_template(
            [
                [_user_turn(len(own), question)]
                for own, question in zip(per_prompt, questions, strict=True)
            ],
            add_generation_prompt=True,
            tokenize=False,
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
                "question, pass fewer images per prompt, or lower max_new_tokens."
            )


def _user_turn(num_images: int, question: str) -> dict[str, object]:
    images = [{"type": "image"}] * num_images
    return {"role": "user", "content": [*images, {"type": "text", "text": question}]}


def _pair_images(
    images: ImagesOfPrompt | Sequence[ImagesOfPrompt], num_questions: int, single: bool
) -> Sequence[Any]:
    if single:
        return [images]
    if images is None or isinstance(images, ImageLike):
        return [images] * num_questions
    if len(images) != num_questions:
        raise ValueError(
            f"{len(images)} images for {num_questions} questions. Give one item per question (an "
            "image, a list of images, or None), or a single image for all of them."
        )
    return images


def _as_list(item: ImagesOfPrompt) -> list[ImageLike]:
    if item is None:
        return []
    return [item] if isinstance(item, ImageLike) else list(item)
