"""What counts as one image, for type annotations: `ImageLike`, and `Images` for one or several."""

from collections.abc import Mapping, Sequence
from os import PathLike
from typing import Protocol

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor


class DicomDataset(Protocol):
    """A `pydicom.Dataset`, by the one member that is typed here: pydicom is an optional package."""

    @property
    def pixel_array(self) -> NDArray[np.generic]: ...


class Volume(Protocol):
    """An image of nibabel, which is an optional package."""

    @property
    def affine(self) -> NDArray[np.generic]: ...


# Bytes are an encoded file; a mapping is the hub's {"bytes": ..., "path": ...}.
ImageLike = (
    Image.Image
    | str
    | PathLike[str]
    | bytes
    | bytearray
    | memoryview
    | NDArray[np.generic]
    | Tensor
    | Mapping[str, object]
    | DicomDataset
    | Volume
)
Images = ImageLike | Sequence[ImageLike]  # a 4-D array or tensor is several
