"""Images and text → `pixel_values` and `input_ids`; `<image>` becomes an image's placeholders."""

import os
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import jinja2
from PIL import Image
from transformers import BatchFeature
from transformers.processing_utils import MultiModalData, ProcessorMixin

from moellava.images import to_eight_bit, to_pil
from moellava.model.chat_templates import TEMPLATES, has_beginning
from moellava.model.publish.remote_code import carry_remote_code
from moellava.model.template_limits import require_bounded_template
from moellava.model.truncation import pad_rows, shorten_text

_REMOTE = ("http://", "https://", "data:")  # transformers reads these itself
# Done after truncation, in place of the tokenizer.
AFTER_TRUNCATION = (
    "truncation",
    "max_length",
    "padding",
    "padding_side",
    "pad_to_multiple_of",
    "return_tensors",
)


class MoeLlavaProcessor(ProcessorMixin):
    """Images and text in one object, with the chat template that the language model was tuned on.

    Args:
        image_processor: the tower's own.
        tokenizer: the language model's; `image_token` is one of its tokens.
        num_image_tokens: placeholders per image, `MoeLlavaConfig.num_image_tokens`.
        chat_template: Jinja text, or a dict of named templates with a `default`.
            `apply_chat_template` also takes the names of `moellava.model.chat_templates.TEMPLATES`,
            such as `chat_template="plain"`.
        image_token: what stands for an image in a prompt.
    """

    def __init__(
        self,
        image_processor: Any = None,
        tokenizer: Any = None,
        num_image_tokens: int = 1,
        chat_template: str | dict[str, str] | None = None,
        image_token: str = "<image>",
    ):
        if tokenizer is not None and image_token not in tokenizer.get_vocab():
            raise ValueError(
                f"The tokenizer has no token {image_token!r}. Load it with "
                "moellava.model.builder_enhanced.load_tokenizer, which adds one."
            )
        named = chat_template if isinstance(chat_template, dict) else {"": chat_template or ""}
        for template in named.values():
            require_bounded_template(template, getattr(tokenizer, "name_or_path", "this processor"))
        self.image_token = image_token
        self.image_token_id = tokenizer.convert_tokens_to_ids(image_token)
        self.num_image_tokens = num_image_tokens
        super().__init__(image_processor, tokenizer, chat_template=chat_template)  # type: ignore[no-untyped-call]

    def save_pretrained(
        self, save_directory: str | os.PathLike[str], *args: Any, **kwargs: Any
    ) -> Any:
        """As transformers'; code that came with a checkpoint goes along."""
        files = super().save_pretrained(save_directory, *args, **kwargs)
        carry_remote_code(save_directory)
        return files

    def prepare_inputs_layout(self, images: Any = None, *args: Any, **kwargs: Any) -> Any:
        # transformers reads no DICOM and no NIfTI, and clamps 16-bit grey to white.
        return super().prepare_inputs_layout(_readable(images), *args, **kwargs)

    def __call__(self, images: Any = None, text: Any = None, **kwargs: Any) -> BatchFeature:
        """As `ProcessorMixin`, but `truncation` drops text tokens only.

        It drops them on the tokenizer's `truncation_side` until the row has `max_length` tokens
        (the tokenizer's if left out); every image keeps its `num_image_tokens` placeholders.
        Text that begins with the beginning-of-text token gets no second one.

        Raises:
            ValueError: if images and `<image>` in the text are not as many, or if the image tokens
                alone are more than `max_length`.
        """
        if self._begin_with_bos(text):
            kwargs.setdefault("add_special_tokens", False)
        given = self._merge_kwargs(tokenizer_init_kwargs=self.tokenizer.init_kwargs, **kwargs)[
            "text_kwargs"
        ]
        if text is None or given.get("truncation") in (None, False, "do_not_truncate"):
            untruncated: BatchFeature = super().__call__(images=images, text=text, **kwargs)
            return untruncated
        kwargs = without(kwargs, AFTER_TRUNCATION)
        for section in ("text_kwargs", "common_kwargs"):
            if section in kwargs:
                kwargs[section] = without(kwargs[section], AFTER_TRUNCATION)
        batch: BatchFeature = super().__call__(
            images=images, text=text, truncation=False, padding=False, verbose=False, **kwargs
        )
        self._truncate_and_pad(batch, given)
        tensors: BatchFeature = batch.convert_to_tensors(
            given.get("return_tensors"), skip_tensor_conversion=self.skip_tensor_conversion
        )
        return tensors

    def _begin_with_bos(self, text: Any) -> bool:
        """Whether a chat template has written the beginning-of-text token, which comes once."""
        texts = [text] if isinstance(text, str) else text
        if not isinstance(texts, list | tuple) or not texts:
            return False
        return all(isinstance(one, str) and has_beginning(self.tokenizer, one) for one in texts)

    def _truncate_and_pad(self, batch: BatchFeature, given: dict[str, Any]) -> None:
        tokenizer = self.tokenizer
        max_length = given.get("max_length") or tokenizer.model_max_length
        shorten_text(
            batch.data,
            max_length,
            image_token_id=self.image_token_id,
            bos_token_id=tokenizer.bos_token_id,
            side=tokenizer.truncation_side,
        )
        padding = given.get("padding", False)
        if padding in (False, "do_not_pad"):
            return
        length = (
            max_length if padding == "max_length" else max(len(ids) for ids in batch["input_ids"])
        )
        multiple = given.get("pad_to_multiple_of") or 1
        side = given.get("padding_side") or tokenizer.padding_side
        pad_rows(
            batch.data,
            -(-length // multiple) * multiple,
            pad_token_id=tokenizer.pad_token_id,
            side=side,
        )

    def apply_chat_template(  # type: ignore[override]  # the rest of a long signature goes through
        self, conversation: Any, chat_template: str | None = None, **kwargs: Any
    ) -> Any:
        """As `ProcessorMixin`; `chat_template` may also be a name of `TEMPLATES`.

        Raises:
            ValueError: if the template refuses the conversation, or cannot be rendered.
        """
        template = TEMPLATES.get(chat_template or "", chat_template)
        try:
            return super().apply_chat_template(conversation, template, **kwargs)
        except jinja2.TemplateError as error:
            raise ValueError(f"The model's chat template refuses the messages: {error}") from error

    def replace_image_token(
        self, image_inputs: dict[str, Any], image_idx: int, **kwargs: Any
    ) -> str:
        return self.image_token * self.num_image_tokens

    def _get_num_multimodal_tokens(
        self, image_sizes: list[list[int]] | None = None, **kwargs: Any
    ) -> MultiModalData:
        """Placeholders for images of the given (height, width): the input size is fixed."""
        if image_sizes is None:
            return MultiModalData()
        return MultiModalData(
            num_image_tokens=[self.num_image_tokens] * len(image_sizes),
            num_image_patches=[1] * len(image_sizes),
        )


def without(settings: Mapping[str, Any], names: Collection[str]) -> dict[str, Any]:
    """The settings that are not among `names`."""
    return {name: value for name, value in settings.items() if name not in names}


def _readable(images: Any) -> Any:
    """Files, encoded bytes and PIL images as 8-bit PIL images, in their nesting; arrays stay."""
    if isinstance(images, list | tuple):
        return [_readable(image) for image in images]
    if isinstance(images, str) and images.startswith(_REMOTE):
        return images
    if isinstance(images, str | Path | bytes | Image.Image):
        return to_eight_bit(to_pil(images))
    return images
