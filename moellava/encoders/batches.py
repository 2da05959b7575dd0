"""Images in, patch tokens out: batches through an encoder, preprocessing beside it.

`encode_images` gives one tensor, `encode_batches` one at a time.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Protocol, TypeVar

import torch
from PIL import Image
from torch import Tensor
from transformers.feature_extraction_utils import BatchFeature

from moellava.encoders.outputs import VisionEncoderOutput
from moellava.images import ImageLike, Images, to_eight_bit, to_pil
from moellava.images.threads import as_image_list, map_in_threads
from moellava.storage.weights import require_finite

T = TypeVar("T")


class PatchEncoder(Protocol):
    """What batches need of a `VisionEncoder`."""

    @property
    def image_processor(self) -> Callable[..., BatchFeature]: ...

    @property
    def device(self) -> torch.device: ...

    @property
    def dtype(self) -> torch.dtype: ...

    def __call__(self, pixel_values: Tensor) -> VisionEncoderOutput: ...


def encode_images(
    encoder: PatchEncoder, images: Images, *, batch_size: int = 16, progress: bool = False
) -> Tensor:
    """Patch tokens (B, N, D) on the encoder's device, in its dtype, without gradients."""
    flat = as_image_list(images)
    if not flat:
        raise ValueError("There are no images to encode.")
    batches = encode_batches(encoder, flat, batch_size=batch_size, progress=progress)
    return torch.cat(list(batches))


def encode_batches(
    encoder: PatchEncoder,
    images: Sequence[T],
    *,
    batch_size: int,
    progress: bool = False,
    to_pixels: Callable[[Sequence[T]], Tensor] | None = None,
) -> Iterator[Tensor]:
    """Patch tokens (B, N, D) by batch; the next is preprocessed while this one is in the model.

    Args:
        to_pixels: pixel values (B, 3, H, W) of a batch of `images`; by default `pixels_of`.
    """
    batches: Iterable[Tensor] = pixel_batches(
        encoder, images, batch_size=batch_size, to_pixels=to_pixels
    )
    if progress:
        from tqdm.auto import tqdm

        batches = tqdm(batches, total=-(-len(images) // batch_size), unit="batch")
    for pixel_values in batches:
        with torch.inference_mode():
            tokens = encoder(pixel_values).patch_tokens
        assert tokens is not None
        require_finite("The tower", tokens)
        yield tokens


def pixels_of(
    encoder: PatchEncoder,
    images: Sequence[ImageLike],
    *,
    load_image: Callable[[ImageLike], Image.Image] = to_pil,
) -> Tensor:
    """Pixel values (B, 3, H, W) of images, by the encoder's own image processor."""
    # transformers' own processors clamp 16-bit images and know no paths: all become 8-bit PIL here.
    ready = map_in_threads(lambda image: to_eight_bit(load_image(image)), images)
    pixel_values: Tensor = encoder.image_processor(ready, return_tensors="pt")["pixel_values"]
    return pixel_values


def pixel_batches(
    encoder: PatchEncoder,
    images: Sequence[T],
    *,
    batch_size: int,
    to_pixels: Callable[[Sequence[T]], Tensor] | None = None,
) -> Iterator[Tensor]:
    """Pixel values (B, 3, H, W), on the encoder's device and in its dtype, a batch ahead."""
    to_pixels = to_pixels or partial(pixels_of, encoder)
    if batch_size < 1:
        raise ValueError(f"batch_size is {batch_size}; expected at least 1.")
    with ThreadPoolExecutor(1) as worker:
        starts = range(0, len(images), batch_size)
        upcoming = None
        for start in starts:
            current = upcoming or worker.submit(to_pixels, images[start : start + batch_size])
            after = images[start + batch_size : start + 2 * batch_size]
            pixel_values = current.result()
            upcoming = worker.submit(to_pixels, after) if after else None
            yield pixel_values.to(encoder.device, encoder.dtype)
