"""Images in, features out: batches through an encoder, preprocessing beside it.

`encode_images` (a list of images to one tensor).
"""

from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from moellava.encoders.images import as_image_list

if TYPE_CHECKING:
    from moellava.encoders.base import VisionEncoder


def encode_images(
    encoder: "VisionEncoder", images: Any, *, batch_size: int = 16, progress: bool = False
) -> Tensor:
    """Patch tokens (B, N, D) on the encoder's device, in its dtype, without gradients."""
    images = as_image_list(images)
    if not images:
        raise ValueError("There are no images to encode.")
    batches = [images[i : i + batch_size] for i in range(0, len(images), batch_size)]
    return torch.cat(list(encode_batches(encoder, batches, progress=progress)))


def encode_batches(
    encoder: "VisionEncoder", batches: Sequence[Sequence[Any]], *, progress: bool = False
) -> Iterator[Tensor]:
    """Patch tokens (B, N, D) of each batch; the next batch is preprocessed while this one is in the model."""
    if progress:
        from tqdm.auto import tqdm

        batches = tqdm(batches, unit="batch")

    def pixels(batch: Sequence[Any]) -> Tensor:
        return encoder.image_processor(list(batch), return_tensors="pt")["pixel_values"]

    with ThreadPoolExecutor(1) as worker:
        upcoming = None
        waiting = iter(batches)
        first = next(waiting, None)
        upcoming = worker.submit(pixels, first) if first is not None else None
        while upcoming is not None:
            pixel_values = upcoming.result()
            following = next(waiting, None)
            upcoming = worker.submit(pixels, following) if following is not None else None
            with torch.inference_mode():
                yield encoder(pixel_values.to(encoder.device, encoder.dtype)).patch_tokens
