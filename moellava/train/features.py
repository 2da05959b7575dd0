"""What a frozen tower makes of each image, encoded once into a file and read from there in every epoch.

Public names: `FeatureFile`, `encode_rows`.
"""

import json
import logging
import time
from collections.abc import Iterable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from moellava.encoders import VisionEncoder
from moellava.encoders.feature_file import encode_files
from moellava.images import image_key, load_image
from moellava.model.checkpoint.tower_identity import weights_fingerprint

logger = logging.getLogger(__name__)


class FeatureFile:
    """Patch tokens (N, D) by image; may be sent to the worker processes of a data loader."""

    def __init__(self, path: Path):
        self.path = path
        with safe_open(path, framework="pt") as file:
            self.metadata = file.metadata()
        names = json.loads(self.metadata["names"])
        self._row_of = {name: row for row, name in enumerate(names)}
        self._tokens: Any = None

    def __call__(self, image: Any) -> Tensor:
        key = image_key(image)
        if key not in self._row_of:
            raise ValueError(
                f"{self.path} has no features of the image {key}. Delete the file to have it made anew."
            )
        if self._tokens is None:  # opened in the process that reads
            self._tokens = safe_open(self.path, framework="pt").get_slice("patch_tokens")
        tokens: Tensor = self._tokens[self._row_of[key]]
        return tokens

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_tokens": None}

    def require(self, encoder: VisionEncoder, keys: Iterable[str], dtype: torch.dtype) -> None:
        """Raise `ValueError` unless the file is of this tower, as exact as `dtype`, and holds all these images."""
        for name in (
            "tower",
            "revision",
            "image_size",
            "grid",
            "select_layer",
            "select_feature",
            "final_norm",
        ):
            found, wanted = json.loads(self.metadata[name]), getattr(encoder.config, name)
            if found != wanted:
                raise ValueError(
                    f"{self.path} holds features of {name}={found!r}, but the model has {wanted!r}. Delete the file to "
                    "have it made anew, or give data.features another name."
                )
        with safe_open(self.path, framework="pt") as file:
            stored = file.get_slice("patch_tokens").get_dtype()
        if dtype == torch.float32 and stored != "F32":
            raise ValueError(
                f"{self.path} holds features as {stored}, but optim.precision is fp32. Delete the file to have it made "
                "anew, or give data.features another name."
            )
        if self.metadata.get("weights") != str(weights_fingerprint(encoder.state_dict())):
            raise ValueError(
                f"{self.path} holds features of a tower with other weights than the model's. Delete the file to have "
                "it made anew, or give data.features another name."
            )
        missing = [key for key in keys if key not in self._row_of]
        if missing:
            raise ValueError(
                f"{self.path} lacks {len(missing)} images, such as {missing[0]}. Delete the file to have it made anew."
            )


def encode_rows(
    encoder: VisionEncoder,
    rows: Iterable[Any],
    path: Path,
    *,
    dtype: torch.dtype,
    autocast: bool,
    progress: bool,
    encodes: bool = True,
) -> FeatureFile:
    """Write the features of all images of `rows`, or check those that are there.

    Args:
        rows: of `moellava.data`.
        path: a killed run is continued from `<path>.partial`.
        dtype: what is stored.
        autocast: compute in bfloat16, as training does.
        encodes: whether this process writes the file; another looks for it until it is there, however long that
            takes. (Waiting in a process group would end with its timeout.) Several machines need a shared folder.

    Raises:
        ValueError: if the file is of another tower, or lacks an image; if an image cannot be read.
    """
    images = {image_key(image): image for row in rows for image in row.images}
    if not images:
        raise ValueError(f"data.features is {str(path)!r}, but no row has an image.")
    while not encodes and not path.exists():
        time.sleep(
            0.2
        )  # encode_files moves the finished file to its place; the launcher ends us if the writer fails
    if not path.exists():
        logger.info("%s: encoding %d images once", path, len(images))
        path.parent.mkdir(parents=True, exist_ok=True)
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
                metadata={"weights": str(weights_fingerprint(encoder.state_dict()))},
            )
    features = FeatureFile(path)
    features.require(encoder, images, dtype)
    return features
