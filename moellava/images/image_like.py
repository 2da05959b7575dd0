"""What counts as an image, for every function that takes one: `ImageLike`; several: `Images`.

`ImagePart` is one of the pictures that an image stands for, such as a slice of a volume.
"""

import os
import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol, TypeAlias

import numpy as np
from PIL import Image
from typing_extensions import TypeIs

from moellava.images.view import View

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


class SlideRegion(NamedTuple):
    """A rectangle of a whole-slide image, as OpenSlide's `read_region` takes it.

    Args:
        x, y: its upper left corner, in pixels of level 0.
        width, height: in pixels of `level`.
        level: 0 is the finest.
    """

    x: int
    y: int
    width: int
    height: int
    level: int = 0


@dataclass(frozen=True, repr=False)
class ImagePart:
    """One of the pictures that an image stands for; it is opened when it is needed.

    Args:
        source: what it is read from: the image, or one file of a DICOM series.
        view: how it is seen.
        place: where it lies, in words for the model ("slice 3 of 8, axial"); empty for an image
            that is one picture.
        region: of a whole-slide image.
    """

    source: "ImageLike"
    view: View
    place: str = ""
    region: SlideRegion | None = None

    def __repr__(self) -> str:
        source = self.source
        named = repr(os.fspath(source)) if isinstance(source, str | os.PathLike) else "..."
        return f"ImagePart({named}, {self.place!r}{self.suffix and ', '}{self.suffix})"

    @property
    def options(self) -> dict[str, object]:
        """The options of `View` that are not left out; a limit is none of how it is seen."""
        given = {
            field.name: getattr(self.view, field.name)
            for field in fields(View)
            if field.name != "max_pixels" and getattr(self.view, field.name) != field.default
        }
        return given if self.region is None else {**given, "region": tuple(self.region)}

    @property
    def suffix(self) -> str:
        """What tells the part from others of its source, such as "#frame=12&plane=axial"."""
        words = [f"{name}={_written(value)}" for name, value in sorted(self.options.items())]
        return f"#{'&'.join(words)}" if words else ""


# A mapping is an image of the hub that was not decoded: {"bytes": ..., "path": ...}.
ImageLike: TypeAlias = (
    "Image.Image | str | os.PathLike[str] | bytes | bytearray | memoryview | np.ndarray | Tensor | "
    "Mapping[str, object] | DicomDataset | NiftiVolume | ImagePart"
)
Images: TypeAlias = "ImageLike | Iterable[Images]"


def is_tensor(image: object) -> "TypeIs[Tensor]":
    """Whether this is a tensor of torch, which is not imported to find out."""
    torch = sys.modules.get("torch")
    return torch is not None and isinstance(image, torch.Tensor)


def _written(value: object) -> str:
    return ",".join(map(_written, value)) if isinstance(value, tuple) else str(value)
