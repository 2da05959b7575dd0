"""What a frozen tower makes of each image, encoded once into a file and read in every epoch."""

import logging
import time
from collections.abc import Iterable
from contextlib import nullcontext
from pathlib import Path

import torch
from torch import Tensor

from moellava.data.rows import Row
from moellava.encoders import VisionEncoder
from moellava.encoders.feature_file import PRECISION, FeatureFile, encode_files
from moellava.images import ImageLike, image_key, load_image
from moellava.storage.weights import weights_fingerprint

logger = logging.getLogger(__name__)


class ImageFeatures:
    """Patch tokens (N, D) by image; may be sent to the worker processes of a data loader."""

    def __init__(self, path: Path) -> None:
        self.file = FeatureFile(path)

    def __call__(self, image: ImageLike) -> Tensor:
        return self.file.tokens(image_key(image))

    def require(self, encoder: VisionEncoder, keys: Iterable[str], dtype: torch.dtype) -> None:
        """Raise `ValueError` unless the file is of this tower, as exact as `dtype`, and whole."""
        file = self.file
        anew = "Delete the file to encode anew, or give data.features another name."
        file.require_encoder(encoder)
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
        names = set(file.names)
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
    encodes: bool = True,
) -> ImageFeatures:
    """Write the features of all images of `rows`, or check those that are there.

    Args:
        rows: of `moellava.data`.
        path: a killed run is continued from `<path>.partial`.
        dtype: what is stored.
        autocast: compute in bfloat16, as training does.
        encodes: whether this process writes the file; another looks for it until it is there,
            however long that takes. (Waiting in a process group would end with its timeout.)
            Several machines need a shared folder.

    Raises:
        ValueError: if the file is of another tower, or lacks an image; if an image cannot be read.
    """
    images = {image_key(image): image for row in rows for image in row.images}
    if not images:
        raise ValueError(f"data.features is {str(path)!r}, but no row has an image.")
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
        with context:
            encode_files(
                encoder,
                list(images.values()),
                list(images),
                path,
                dtype=dtype,
                progress=progress,
                load_image=load_image,
                metadata=metadata,
            )
    features = ImageFeatures(path)
    features.require(encoder, images, dtype)
    return features
