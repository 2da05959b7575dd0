"""What counts as an image, for every function that takes one: `ImageLike`; several: `Images`."""

import os
import sys
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any, Protocol, TypeAlias

import numpy as np
from PIL import Image
from typing_extensions import TypeIs

if TYPE_CHECKING:  # reading data and scoring answers need no torch
    from torch import Tensor

# pydicom and nibabel are optional, and transformers takes every import statement of a checkpoint's
# code for a requirement, even one for type checkers only. So their classes are described, not
# named.


class DicomDataset(Protocol):
    """A `pydicom.Dataset`: elements by keyword."""

    file_meta: Any

    def __getattr__(self, name: str) -> Any: ...
    def __getitem__(self, key: object) -> Any: ...
    def __contains__(self, name: object) -> bool: ...
    def get(self, key: object, default: object = None) -> Any: ...


class NiftiVolume(Protocol):
    """A nibabel image: voxels, and where they lie in the patient."""

    @property
    def shape(self) -> tuple[int, ...]: ...
    @property
    def affine(self) -> np.ndarray: ...
    @property
    def dataobj(self) -> Any: ...
    @property
    def header(self) -> Any: ...


# A mapping is an image of the hub that was not decoded: {"bytes": ..., "path": ...}.
ImageLike: TypeAlias = (
    "Image.Image | str | os.PathLike[str] | bytes | bytearray | memoryview | np.ndarray | Tensor | "
    "Mapping[str, object] | DicomDataset | NiftiVolume"
)
Images: TypeAlias = "ImageLike | Iterable[Images]"


def is_tensor(image: object) -> "TypeIs[Tensor]":
    """Whether this is a tensor of torch, which is not imported to find out."""
    torch = sys.modules.get("torch")
    return torch is not None and isinstance(image, torch.Tensor)
