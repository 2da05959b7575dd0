"""Images and text → `pixel_values` and `input_ids`, with one `<image>` expanded to an image's placeholders."""

from pathlib import Path
from typing import Any

from PIL import Image
from transformers.processing_utils import MultiModalData, ProcessorMixin

from moellava.images import to_eight_bit, to_pil

_REMOTE = ("http://", "https://", "data:")  # transformers' own business


class MoeLlavaProcessor(ProcessorMixin):
    """One object for both inputs of the model, with the chat template that the language model was tuned on.

    Args:
        image_processor: the tower's own.
        tokenizer: the language model's; `image_token` is one of its tokens.
        num_image_tokens: placeholders per image, `MoeLlavaConfig.num_image_tokens`.
        chat_template: Jinja text, or a dict of named templates with a `default`.
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
        self.image_token = image_token
        self.image_token_id = tokenizer.convert_tokens_to_ids(image_token)
        self.num_image_tokens = num_image_tokens
        super().__init__(image_processor, tokenizer, chat_template=chat_template)

    def prepare_inputs_layout(self, images: Any = None, *args: Any, **kwargs: Any) -> Any:
        # transformers reads no DICOM and no NIfTI, and clamps 16-bit grey to white.
        return super().prepare_inputs_layout(_readable(images), *args, **kwargs)

    def replace_image_token(self, image_inputs: dict[str, Any], image_idx: int, **kwargs: Any) -> str:
        return self.image_token * self.num_image_tokens

    def _get_num_multimodal_tokens(self, image_sizes: list[list[int]] | None = None, **kwargs: Any) -> MultiModalData:
        """Placeholders for images of the given (height, width): the same for all, since the input size is fixed."""
        if image_sizes is None:
            return MultiModalData()
        return MultiModalData(
            num_image_tokens=[self.num_image_tokens] * len(image_sizes),
            num_image_patches=[1] * len(image_sizes),
        )


def _readable(images: Any) -> Any:
    """Files, encoded bytes and PIL images as 8-bit PIL images, in the nesting that they came in; arrays stay."""
    if isinstance(images, (list, tuple)):
        return [_readable(image) for image in images]
    if isinstance(images, str) and images.startswith(_REMOTE):
        return images
    if isinstance(images, (str, Path, bytes, Image.Image)):
        return to_eight_bit(to_pil(images))
    return images
