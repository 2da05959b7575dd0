"""Images and text → `pixel_values` and `input_ids`; `<image>` becomes an image's placeholders."""

import math
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
from moellava.model.tiling import Layout, Tiling, cut_tiles
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
        two_rows = Layout(f"{self.image_token}\n{self.image_token}", 2, 1, 2)
        return [token for token in self.layout_ids(two_rows) if token != self.image_token_id]

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

    def image_inputs(self, images: Sequence[Any], **options: Any) -> dict[str, Tensor]:
        """What the model needs of images, beside the placeholders.

        Args:
            images: as the image processor takes them; with tiling, PIL images of any size.
            **options: of the image processor.

        Returns:
            `pixel_values` (V, 3, H, W) float32, all views in the order of their placeholders;
            without tiling, V is the number of images. `image_sizes` (I, 2), height and width of
            each image, if the model merges the views of an image.
        """
        options |= {"return_tensors": "pt"}
        if self.tiling is None:
            return {"pixel_values": self.image_processor(images, **options)["pixel_values"]}
        pictures = [_grey_or_rgb(image) for image in images]
        views = [self._views(picture, options) for picture in pictures]
        sizes = self.merge_inputs([picture.size for picture in pictures])
        return {"pixel_values": torch.cat(views), **sizes}

    def merge_inputs(self, sizes: Sequence[tuple[int, int]]) -> dict[str, Tensor]:
        """`image_sizes` (I, 2) for images of this (width, height), if the model merges views."""
        if self.tiling is None or self.tiling["merge"] == "flat":
            return {}
        return {"image_sizes": torch.tensor([(height, width) for width, height in sizes])}

    def pixel_values(self, images: Sequence[Any], **options: Any) -> Tensor:
        """`pixel_values` of `image_inputs`."""
        return self.image_inputs(images, **options)["pixel_values"]

    def _views(self, picture: Image.Image, options: Mapping[str, Any]) -> Tensor:
        """(V, 3, H, W): the views of one grey or RGB picture, with tiling."""
        if hasattr(self.image_processor, "image_grid_pinpoints"):  # LLaVA-NeXT's cuts tiles itself
            own: Tensor = self.image_processor([picture.convert("RGB")], **options)["pixel_values"][
                0
            ]
            return own
        assert self.tiling is not None
        tile = self.view_size
        tiling = Tiling(**self.tiling)
        grid = tiling.choose_grid(*picture.size, tile)
        num_views, num_tiles = tiling.num_views(grid), math.prod(grid)
        views: list[Tensor] = []
        if num_views != num_tiles or num_views == 1:
            views.append(self.image_processor([picture], **options)["pixel_values"])
        if num_views > 1:
            whole = {"do_resize": False, "do_center_crop": False}  # tiles have the right size
            tiles = cut_tiles(picture, grid, tile)
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

    def layout(self, size: tuple[int, int]) -> Layout:
        """What stands for an image of this (width, height)."""
        if self.tiling is None:
            return Layout(self.image_token, 1, self.num_image_tokens, 1)
        grid, tiling = self.grid(size), Tiling(**self.tiling)
        return tiling.layout(size, grid, self.image_token, self.num_image_tokens)

    def placeholders(self, layout: Layout) -> str:
        """The text of a layout with all placeholders of each mark."""
        return layout.text.replace(self.image_token, self.image_token * layout.tokens_per_mark)

    def layout_ids(self, layout: Layout) -> list[int]:
        """The token ids of `placeholders(layout)`."""
        ids = self.tokenizer(layout.text, add_special_tokens=False)["input_ids"]
        repeats = {self.image_token_id: layout.tokens_per_mark}
        return [token for token in ids for _ in range(repeats.get(token, 1))]

    def _process_images(self, images: Any, **kwargs: Any) -> tuple[dict[str, Any], list[str]]:
        if self.tiling is None:
            untiled: tuple[dict[str, Any], list[str]] = super()._process_images(images, **kwargs)
            return untiled
        listed: Any = make_flat_list_of_images(images)  # a list, whatever transformers declares
        flat = [_grey_or_rgb(image) for image in listed]
        texts = [self.placeholders(self.layout(image.size)) for image in flat]
        return dict(self.image_inputs(flat, **kwargs)), texts

    def replace_image_token(
        self, image_inputs: dict[str, Any], image_idx: int, **kwargs: Any
    ) -> str:
        return self.image_token * self.num_image_tokens

    def _get_num_multimodal_tokens(
        self, image_sizes: list[list[int]] | None = None, **kwargs: Any
    ) -> MultiModalData:
        """Placeholders and views of images of the given (height, width)."""
        if image_sizes is None:
            return MultiModalData()
        layouts = [self.layout((width, height)) for height, width in image_sizes]
        return MultiModalData(
            num_image_tokens=[layout.num_tokens for layout in layouts],
            num_image_patches=[layout.num_views for layout in layouts],
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


def _grey_or_rgb(image: Any) -> Image.Image:
    """The image in 8 bits; a grey one stays grey, so that it is scaled in a third of the time."""
    picture = to_eight_bit(to_pil(image))
    return picture if picture.mode == "L" else picture.convert("RGB")
