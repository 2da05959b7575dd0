"""What a frozen tower makes of each image, encoded once into a file and read in every epoch.

With tiling, of each view of each image. The file calls a view `IMAGE#view=NUMBER,WIDTHxHEIGHT`; the
size is the image's, and says how its views lie.
"""

import json
import logging
import re
import time
from collections.abc import Iterable, Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path

import torch
from torch import Tensor

from moellava.data.collate import KeptViews
from moellava.data.rows import Row
from moellava.encoders import VisionEncoder
from moellava.encoders.feature_file import PRECISION, FeatureFile, encode_files
from moellava.images import ImageLike, image_key, load_image
from moellava.images.threads import map_in_threads
from moellava.model.processing_moellava import MoeLlavaProcessor
from moellava.storage.weights import weights_fingerprint

TILING = "tiling"  # in the file's metadata
_VIEW = re.compile(r"(.*)#view=(\d+),(\d+)x(\d+)", re.DOTALL)

logger = logging.getLogger(__name__)


class ImageFeatures:
    """Patch tokens by image; may be sent to the worker processes of a data loader."""

    def __init__(self, path: Path) -> None:
        self.file = FeatureFile(path)
        self._views: dict[str, list[str]] = {}
        self._sizes: dict[str, tuple[int, int]] = {}
        if TILING in self.file.metadata:
            for name in self.file.names:
                found = _VIEW.fullmatch(name)
                if found is None:
                    raise ValueError(f"{path} has tiling, but no view in the name {name!r}.")
                key, _, width, height = found.groups()
                self._views.setdefault(key, []).append(name)
                self._sizes[key] = int(width), int(height)

    def __call__(self, image: ImageLike) -> KeptViews:
        """The patch tokens of an image's views and its size; without tiling, of one view."""
        key = image_key(image)
        names = self._views.get(key, [key])  # one that is not there is named by the file
        tokens = torch.stack([self.file.tokens(name) for name in names])
        return KeptViews(tokens, self._sizes.get(key, (1, 1)))

    def require(
        self,
        encoder: VisionEncoder,
        keys: Iterable[str],
        dtype: torch.dtype,
        tiling: Mapping[str, object] | None = None,
    ) -> None:
        """Raise `ValueError` unless the file is of this tower, as exact as `dtype`, and whole."""
        file = self.file
        anew = "Delete the file to encode anew, or give data.features another name."
        file.require_encoder(encoder)
        kept = file.metadata.get(TILING, "null")
        if kept != json.dumps(tiling):
            raise ValueError(
                f"{file.path} holds features with tiling={kept}, but the model has "
                f"{json.dumps(tiling)}. {anew}"
            )
        stored = str(file.dtype).removeprefix("torch.")
        for name, what in ((stored, "as"), (file.precision, "computed in")):
            if dtype == torch.float32 and name != "float32":
                raise ValueError(
                    f"{file.path} holds features {what} {name}, but optim.precision is fp32. {anew}"
                )
        if file.metadata.get("weights") != str(weights_fingerprint(encoder.state_dict())):
            raise ValueError(
                f"{file.path} holds features of a tower with other weights than the model's. {anew}"
            )
        names = self._views.keys() if tiling else set(file.names)
        missing = [key for key in keys if key not in names]
        if missing:
            raise ValueError(
                f"{file.path} lacks {len(missing)} images, such as {missing[0]}. {anew}"
            )


def encode_rows(
    encoder: VisionEncoder,
    rows: Iterable[Row],
    path: Path,
    *,
    dtype: torch.dtype,
    autocast: bool,
    progress: bool,
    processor: MoeLlavaProcessor | None = None,
    encodes: bool = True,
) -> ImageFeatures:
    """Write the features of all images of `rows`, or check those that are there.

    Args:
        rows: of `moellava.data`.
        path: a killed run is continued from `<path>.partial`.
        dtype: what is stored.
        autocast: compute in bfloat16, as training does.
        processor: of the model; if it has tiling, each view of an image is kept.
        encodes: whether this process writes the file; another looks for it until it is there,
            however long that takes. (Waiting in a process group would end with its timeout.)
            Several machines need a shared folder.

    Raises:
        ValueError: if the file is of another tower, or lacks an image; if an image cannot be read.
    """
    images = {image_key(image): image for row in rows for image in row.images}
    if not images:
        raise ValueError(f"data.features is {str(path)!r}, but no row has an image.")
    tiling = None if processor is None else processor.tiling
    while not encodes and not path.exists():
        # encode_files moves the whole file to its place; the launcher ends us if the writer fails.
        time.sleep(0.2)
    if not path.exists():
        logger.info("%s: encoding %d images once", path, len(images))
        path.parent.mkdir(parents=True, exist_ok=True)
        metadata = {"weights": str(weights_fingerprint(encoder.state_dict()))}
        if autocast:
            metadata[PRECISION] = "bfloat16"
        context = (
            torch.autocast(encoder.device.type, dtype=torch.bfloat16) if autocast else nullcontext()
        )
        views = _Views(processor, images) if processor is not None and tiling else None
        if views is not None:
            metadata[TILING] = json.dumps(tiling)
        with context:
            encode_files(
                encoder,
                list(images.values()) if views is None else views.images,
                list(images) if views is None else views.names,
                path,
                dtype=dtype,
                progress=progress,
                load_image=load_image,
                to_pixels=None if views is None else views.pixels,
                metadata=metadata,
            )
    features = ImageFeatures(path)
    features.require(encoder, images, dtype, tiling)
    return features


class _Views:
    """All views of images, one after the other; images are opened once to know their sizes."""

    def __init__(self, processor: MoeLlavaProcessor, images: Mapping[str, ImageLike]) -> None:
        self.processor = processor
        self.images: list[ImageLike] = []
        self.names: list[str] = []
        self._numbers: list[tuple[str, int]] = []  # each view's image and number
        self._open: dict[str, Tensor] = {}  # views of the images of the last batch
        sizes = map_in_threads(lambda image: load_image(image).size, images.values())
        for (key, image), size in zip(images.items(), sizes, strict=True):
            num_views = processor.layout(size).num_views
            self.images += [image] * num_views
            self.names += [f"{key}#view={n},{size[0]}x{size[1]}" for n in range(num_views)]
            self._numbers += [(key, n) for n in range(num_views)]

    def pixels(self, batch: Sequence[tuple[ImageLike, int]]) -> Tensor:
        """Pixel values (B, 3, H, W) of views by their places in `names`."""
        numbers = [self._numbers[place] for _, place in batch]
        wanted = {key: image for (image, _), (key, _) in zip(batch, numbers, strict=True)}
        new = [key for key in wanted if key not in self._open]
        opened = map_in_threads(
            lambda key: self.processor.pixel_values([load_image(wanted[key])]), new
        )
        known = {**self._open, **dict(zip(new, opened, strict=True))}
        self._open = {key: known[key] for key in wanted}
        return torch.stack([known[key][number] for key, number in numbers])
