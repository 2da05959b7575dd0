"""Images of any kind in, normalised pixels out, equal to open_clip's own transform.

`BiomedClipImageProcessor` (a Hugging Face image processor: resize, crop, rescale, normalise), over
`moellava.images`, which reads the files.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image
from transformers.feature_extraction_utils import BatchFeature
from transformers.image_utils import (
    ChannelDimension,
    PILImageResampling,
    SizeDict,
)
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from transformers.processing_utils import ImagesKwargs
from transformers.utils.constants import OPENAI_CLIP_MEAN, OPENAI_CLIP_STD
from transformers.utils.generic import TensorType
from typing_extensions import Unpack

from moellava.images import Images, to_eight_bit, to_pil
from moellava.images.threads import as_image_list, map_in_threads
from moellava.storage.sources import JsonObject

RESIZE_MODES = ("shortest", "longest", "squash")
INTERPOLATIONS = {"bicubic": PILImageResampling.BICUBIC, "bilinear": PILImageResampling.BILINEAR}


class BiomedClipImageProcessorKwargs(ImagesKwargs, total=False):
    """open_clip's two settings that transformers has no word for.

    resize_mode: "shortest" (shorter side to size, then crop), "longest" (longer side, then pad),
    "squash".
    fill_color: grey level 0..255 of the padding.
    """

    resize_mode: str
    fill_color: int


class BiomedClipImageProcessor(CLIPImageProcessorPil):
    """open_clip's inference transform as a Hugging Face image processor, with equal bits.

    Images of a batch are resized in parallel threads (Pillow releases the lock), one per core.
    """

    # transformers' CLIP processor floors the crop's margin where torchvision rounds it, and
    # open_clip resizes in the image's own mode before it converts to RGB: hence the whole path is
    # ours, on PIL images.
    valid_kwargs = BiomedClipImageProcessorKwargs
    image_mean = OPENAI_CLIP_MEAN
    image_std = OPENAI_CLIP_STD
    resize_mode = "shortest"
    fill_color = 0

    def __init__(self, **kwargs: Unpack[BiomedClipImageProcessorKwargs]):
        super().__init__(**kwargs)  # type: ignore[misc]
        if self.resize_mode not in RESIZE_MODES:
            raise ValueError(
                f"resize_mode is {self.resize_mode!r}; choose one of {', '.join(RESIZE_MODES)}."
            )

    @classmethod
    def from_open_clip(
        cls, preprocess_cfg: JsonObject, image_size: int | Sequence[int]
    ) -> "BiomedClipImageProcessor":
        """The processor that open_clip's `preprocess_cfg` describes, for an image size."""
        height, width = (image_size, image_size) if isinstance(image_size, int) else image_size
        interpolation = preprocess_cfg.get("interpolation") or "bicubic"
        if interpolation == "random":  # open_clip's word for training; it evaluates with bicubic
            interpolation = "bicubic"
        if interpolation not in INTERPOLATIONS:
            raise ValueError(
                f"preprocess_cfg has interpolation {interpolation!r}; known: "
                f"{', '.join(sorted(INTERPOLATIONS))}."
            )
        resize_mode = preprocess_cfg.get("resize_mode") or "shortest"
        square_crop = height == width and resize_mode == "shortest"
        return cls(
            size={"shortest_edge": height} if square_crop else {"height": height, "width": width},
            crop_size={"height": height, "width": width},
            do_center_crop=resize_mode != "squash",
            resize_mode=resize_mode,
            # open_clip keeps its default interpolation where the target is not square.
            resample=INTERPOLATIONS[
                interpolation if height == width or resize_mode != "shortest" else "bicubic"
            ],
            fill_color=int(preprocess_cfg.get("fill_color") or 0),
            image_mean=_triple(preprocess_cfg.get("mean") or OPENAI_CLIP_MEAN),
            image_std=_triple(preprocess_cfg.get("std") or OPENAI_CLIP_STD),
        )

    def _prepare_image_like_inputs(
        self, images: Images, *args: object, **kwargs: object
    ) -> list[Image.Image]:
        return [to_pil(image) for image in as_image_list(images)]

    def _preprocess(  # type: ignore[override]
        self,
        images: list[Image.Image],
        do_resize: bool,
        size: SizeDict,
        resample: PILImageResampling,
        do_center_crop: bool,
        crop_size: SizeDict,
        resize_mode: str,
        fill_color: int,
        return_tensors: str | TensorType | None = None,
        **settings: Any,
    ) -> BatchFeature:
        _refuse_foreign_settings(settings)

        def resized(image: Image.Image) -> np.ndarray:
            image = to_eight_bit(image)
            if do_resize:
                image = image.resize(_target_size(image.size, size, resize_mode), resample)
            if do_center_crop:
                image = center_crop(image, crop_size["height"], crop_size["width"], fill_color)
            return np.asarray(
                image if image.mode == "RGB" else image.convert("RGB")
            )  # (H, W, 3) uint8

        arrays = map_in_threads(resized, images)
        shapes = sorted({array.shape for array in arrays})  # one, unless cropping is off
        if len(shapes) == 1:
            pixels = _normalised(np.stack(arrays), settings)
            values = (
                pixels if return_tensors in ("pt", TensorType.PYTORCH) else list(pixels.numpy())
            )
            return BatchFeature(data={"pixel_values": values}, tensor_type=return_tensors)
        if return_tensors is not None:
            raise ValueError(
                f"Images of the sizes {[shape[:2] for shape in shapes]} cannot be stacked; leave "
                "cropping on."
            )
        values = [_normalised(np.stack([array]), settings)[0].numpy() for array in arrays]
        return BatchFeature(data={"pixel_values": values})


def _normalised(images: np.ndarray, settings: JsonObject) -> torch.Tensor:
    """(B, H, W, 3) uint8 -> (B, 3, H, W) float32, as torchvision's ToTensor and Normalize do."""
    pixels = torch.from_numpy(images).permute(0, 3, 1, 2)
    pixels = pixels.to(settings.get("device"), torch.float32, memory_format=torch.contiguous_format)
    if settings["do_rescale"]:
        # ToTensor divides by 255; multiplying by 1/255 would differ in the last bit.
        factor = settings["rescale_factor"]
        pixels = pixels.div_(255) if factor == 1 / 255 else pixels.mul_(factor)
    if settings["do_normalize"]:
        for name, in_place in (("image_mean", pixels.sub_), ("image_std", pixels.div_)):
            in_place(
                torch.tensor(settings[name], dtype=torch.float32, device=pixels.device).view(
                    3, 1, 1
                )
            )
    return pixels


def _refuse_foreign_settings(settings: JsonObject) -> None:
    """Refuse transformers' common settings that open_clip's transform does not have."""
    if not settings["do_convert_rgb"]:
        raise ValueError("do_convert_rgb=False: the tower takes three channels. Leave it out.")
    for name, allowed in (
        ("do_pad", (None, False)),
        ("pad_size", (None,)),
        ("input_data_format", (None,)),
    ):
        if settings.get(name) not in allowed:
            raise ValueError(
                f"{name}={settings[name]!r} has no meaning in open_clip's transform. Leave it out."
            )
    if settings.get("data_format") not in (None, ChannelDimension.FIRST, "channels_first"):
        raise ValueError(
            f"data_format={settings['data_format']!r}: pixel values are (3, H, W). Leave it out."
        )


def center_crop(image: Image.Image, height: int, width: int, fill: int = 0) -> Image.Image:
    """Crop the middle, or pad a smaller image; margins are rounded as torchvision does."""
    if image.width < width or image.height < height:
        canvas = Image.new("RGB", (max(width, image.width), max(height, image.height)), (fill,) * 3)
        rgb = image if image.mode == "RGB" else image.convert("RGB")
        canvas.paste(rgb, ((canvas.width - image.width) // 2, (canvas.height - image.height) // 2))
        image = canvas
    left, top = round((image.width - width) / 2.0), round((image.height - height) / 2.0)
    return image.crop((left, top, left + width, top + height))


def _target_size(image_size: tuple[int, int], size: SizeDict, resize_mode: str) -> tuple[int, int]:
    """(width, height) to resize to, with the arithmetic of torchvision and open_clip."""
    width, height = image_size
    if size.longest_edge:
        raise ValueError(
            f"size is {dict(size)}; expected 'shortest_edge' alone, or 'height' and 'width'."
        )
    if size.shortest_edge:
        short, long = sorted(image_size)
        new_long = int(size.shortest_edge * long / short)
        return (size.shortest_edge, new_long) if width <= height else (new_long, size.shortest_edge)
    if not size.height or not size.width:
        raise ValueError(
            f"size is {dict(size)}; expected 'shortest_edge', or 'height' and 'width'."
        )
    if resize_mode == "squash":
        return size.width, size.height
    ratios = height / size.height, width / size.width
    ratio = max(ratios) if resize_mode == "longest" else min(ratios)
    return round(width / ratio), round(height / ratio)


def _triple(values: float | Sequence[float]) -> list[float]:
    return (
        [float(values)] * 3
        if isinstance(values, (int, float))
        else [float(value) for value in values]
    )
