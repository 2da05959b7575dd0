"""Images and text → `pixel_values` and `input_ids`; `<image>` becomes an image's placeholders."""

import os
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import jinja2
import torch
from PIL import Image
from torch import Tensor
from transformers import BatchFeature
from transformers.image_utils import make_flat_list_of_images
from transformers.processing_utils import MultiModalData, ProcessorMixin

from moellava.images import to_eight_bit, to_pil
from moellava.model.chat_templates import TEMPLATES, has_beginning
from moellava.model.publish.remote_code import carry_remote_code
from moellava.model.template_limits import require_bounded_template
from moellava.model.tiling import Tiling, cut_tiles
from moellava.model.truncation import pad_rows, shorten_text
from moellava.settings import from_mapping

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
        num_image_tokens: placeholders per view of an image, `MoeLlavaConfig.num_image_tokens`.
        chat_template: Jinja text, or a dict of named templates with a `default`.
            `apply_chat_template` also takes the names of `moellava.model.chat_templates.TEMPLATES`,
            such as `chat_template="plain"`.
        image_token: what stands for an image in a prompt.
        tiling: fields of `moellava.model.tiling.Tiling`, by which a large image becomes several
            views; None is one view of each.
    """

    def __init__(
        self,
        image_processor: Any = None,
        tokenizer: Any = None,
        num_image_tokens: int = 1,
        chat_template: str | dict[str, str] | None = None,
        image_token: str = "<image>",
        tiling: Mapping[str, Any] | None = None,
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
        self.tiling: dict[str, Any] | None = None
        self.set_tiling(tiling)
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
        (the tokenizer's if left out); every image keeps its placeholders, and the line breaks
        between its rows of tiles.
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
            kept_between=self._row_separator(),
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

    def _row_separator(self) -> list[int]:
        """The token ids between two rows of tiles; empty without tiling."""
        if self.tiling is None:
            return []
        mark = self.image_token
        return [
            token for token in self.layout_ids(f"{mark}\n{mark}") if token != self.image_token_id
        ]

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

    def set_tiling(self, tiling: Mapping[str, Any] | None) -> None:
        """See images as another number of views from now on; None is one view of each.

        A model answers best with the tiling that it was trained with.

        Raises:
            ValueError: an unknown field of `Tiling`, or a value that it does not admit.
        """
        if tiling is not None:
            tiling = asdict(from_mapping(Tiling, tiling, kind="key of tiling"))
        self.tiling = tiling  # a dict, since a saved processor keeps its attributes as JSON

    def pixel_values(self, images: Sequence[Any], **options: Any) -> Tensor:
        """All views of the images, in the order of their placeholders.

        Args:
            images: as the image processor takes them; with tiling, PIL images of any size.
            **options: of the image processor.

        Returns:
            (V, 3, H, W) float32; without tiling, V is the number of images.
        """
        options |= {"return_tensors": "pt"}
        if self.tiling is None:
            values: Tensor = self.image_processor(images, **options)["pixel_values"]
            return values
        views: list[Tensor] = []
        for image in map(_as_rgb, images):
            grid = self.grid(image.size)
            if grid == (1, 1) or self.tiling["overview"]:
                views.append(self.image_processor([image], **options)["pixel_values"])
            if grid != (1, 1):
                whole = {"do_resize": False, "do_center_crop": False}  # tiles have the right size
                tiles = cut_tiles(image, grid, self.view_size)
                views.append(self.image_processor(tiles, **options, **whole)["pixel_values"])
        return torch.cat(views)

    @property
    def view_size(self) -> tuple[int, int]:
        """Height and width of what the tower sees, in pixels; a tile's."""
        seen = self.image_processor([Image.new("RGB", (64, 64))], return_tensors="pt")
        height, width = seen["pixel_values"].shape[-2:]
        return int(height), int(width)

    def grid(self, size: tuple[int, int]) -> tuple[int, int]:
        """Rows and columns of tiles of an image of this (width, height); (1, 1) is one view."""
        if self.tiling is None:
            return 1, 1
        return Tiling(**self.tiling).choose_grid(*size, self.view_size)

    def layout(self, size: tuple[int, int]) -> str:
        """What stands for an image of this (width, height): `image_token` once for each view."""
        if self.tiling is None:
            return self.image_token
        return Tiling(**self.tiling).layout(self.grid(size), self.image_token)

    def placeholders(self, layout: str) -> str:
        """A layout with all placeholders of each view."""
        return layout.replace(self.image_token, self.image_token * self.num_image_tokens)

    def layout_ids(self, layout: str) -> list[int]:
        """The token ids of `placeholders(layout)`."""
        ids = self.tokenizer(layout, add_special_tokens=False)["input_ids"]
        repeats = {self.image_token_id: self.num_image_tokens}
        return [token for token in ids for _ in range(repeats.get(token, 1))]

    def _process_images(self, images: Any, **kwargs: Any) -> tuple[dict[str, Any], list[str]]:
        if self.tiling is None:
            untiled: tuple[dict[str, Any], list[str]] = super()._process_images(images, **kwargs)
            return untiled
        listed: Any = make_flat_list_of_images(images)  # a list, whatever transformers declares
        flat = [_as_rgb(image) for image in listed]
        texts = [self.placeholders(self.layout(image.size)) for image in flat]
        return {"pixel_values": self.pixel_values(flat, **kwargs)}, texts

    def replace_image_token(
        self, image_inputs: dict[str, Any], image_idx: int, **kwargs: Any
    ) -> str:
        return self.placeholders(self.image_token)

    def _get_num_multimodal_tokens(
        self, image_sizes: list[list[int]] | None = None, **kwargs: Any
    ) -> MultiModalData:
        """Placeholders and views of images of the given (height, width)."""
        if image_sizes is None:
            return MultiModalData()
        layouts = [self.layout((width, height)) for height, width in image_sizes]
        return MultiModalData(
            num_image_tokens=[
                self.layout_ids(layout).count(self.image_token_id) for layout in layouts
            ],
            num_image_patches=[layout.count(self.image_token) for layout in layouts],
        )


def without(settings: Mapping[str, Any], names: Collection[str]) -> dict[str, Any]:
    """The settings that are not among `names`."""
    return {name: value for name, value in settings.items() if name not in names}


def _readable(images: Any) -> Any:
    """Files, encoded bytes and PIL images as 8-bit PIL images, in their nesting; arrays stay."""
    if isinstance(images, list | tuple):
        # TRL has None for a prompt without images among others.
        return [[] if image is None else _readable(image) for image in images]
    if isinstance(images, str) and images.startswith(_REMOTE):
        return images
    if isinstance(images, str | Path | bytes | Image.Image):
        return to_eight_bit(to_pil(images))
    return images


def _as_rgb(image: Any) -> Image.Image:
    return to_eight_bit(to_pil(image)).convert("RGB")
