"""An image processor and a picture's size → the box of the picture that the model sees.

How a processor resizes, crops and pads is measured on ramps of grey, not read from its settings: so
any processor will do that scales along the axes, and a change of its rounding cannot go unseen.

| name | what it gives |
|---|---|
| `Frame` | the box, in pixels of the picture; `place` puts a map of patches into it |
| `measure_frame` | the frame of a processor for pictures of one size |
| `view_frames` | the frames of all views of a picture, its tiles included |
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image

from moellava.model.processing_moellava import MoeLlavaProcessor
from moellava.model.tiling import tile_boxes

Array = npt.NDArray[np.float32]
ImageProcessor = Callable[..., Mapping[str, torch.Tensor]]


@dataclass(frozen=True, kw_only=True)
class Frame:
    """The part of a picture that became the model's input; beyond the picture where it was padded.

    Args:
        left, top, right, bottom: edges in pixels of the picture, which is `width` x `height`.
    """

    left: float
    top: float
    right: float
    bottom: float
    width: int
    height: int

    @property
    def visible(self) -> tuple[float, float, float, float]:
        """Left, top, right, bottom of what the model sees of the picture itself."""
        return (
            max(self.left, 0.0),
            max(self.top, 0.0),
            min(self.right, float(self.width)),
            min(self.bottom, float(self.height)),
        )

    def cell_of(self, x: float, y: float, grid: tuple[int, int]) -> tuple[int, int] | None:
        """The (row, column) of the patch that covers a point of the picture; None outside."""
        column = (x - self.left) / (self.right - self.left) * grid[1]
        row = (y - self.top) / (self.bottom - self.top) * grid[0]
        if 0 <= row < grid[0] and 0 <= column < grid[1]:
            return int(row), int(column)
        return None

    def place(
        self, values: Array, *, smooth: bool = False, size: tuple[int, int] | None = None
    ) -> Array:
        """A map of patches on the picture: NaN where the model saw nothing.

        Args:
            values: (rows, columns).
            smooth: bilinear between the centres of patches; otherwise each patch is one flat block.
            size: (width, height) of the result, if the picture is shown smaller than it is.

        Returns:
            (height, width) float32.
        """
        width, height = size or (self.width, self.height)
        x = (np.arange(width) + 0.5) * (self.width / width)
        y = (np.arange(height) + 0.5) * (self.height / height)
        u = (x - self.left) / (self.right - self.left)  # 0..1 across the model's input
        v = (y - self.top) / (self.bottom - self.top)
        points = np.stack(np.meshgrid(2 * u - 1, 2 * v - 1), axis=-1)  # (height, width, 2)
        placed = torch.nn.functional.grid_sample(
            torch.from_numpy(np.ascontiguousarray(values, dtype=np.float32))[None, None],
            torch.from_numpy(points.astype(np.float32))[None],
            mode="bilinear" if smooth else "nearest",
            padding_mode="border",
            align_corners=False,
        )[0, 0].numpy()
        is_inside = ((v >= 0) & (v < 1))[:, None] & ((u >= 0) & (u < 1))[None, :]
        return np.where(is_inside, placed, np.float32(np.nan)).astype(np.float32)


def view_frames(processor: MoeLlavaProcessor, size: tuple[int, int]) -> list[Frame]:
    """What each view of a picture of this (width, height) shows of it, in the views' order."""
    grid, (width, height) = processor.grid(size), size
    num_views, num_tiles = processor.layout(size).num_views, grid[0] * grid[1]
    if num_views == 1:
        return [measure_frame(processor.image_processor, size)]
    has_overview = num_views > num_tiles
    tiles = [
        Frame(left=left, top=top, right=right, bottom=bottom, width=width, height=height)
        for left, top, right, bottom in tile_boxes(size, grid, processor.view_size)
    ]
    return [*([measure_frame(processor.image_processor, size)] if has_overview else []), *tiles]


def measure_frame(processor: ImageProcessor, size: tuple[int, int]) -> Frame:
    """The frame of an image processor for pictures of one (width, height).

    Raises:
        ValueError: if the processor shows nothing of such a picture, or turns or mirrors it.
    """
    width, height = size
    black = _processed(processor, np.zeros((height, width), dtype=np.uint8))
    contrast = _processed(processor, np.full((height, width), 255, dtype=np.uint8)) - black
    is_picture = contrast > 0.5 * contrast.max()  # False where the processor padded
    if not is_picture.any():
        raise ValueError(f"The image processor shows nothing of a picture of {width}x{height}.")

    def profile(levels: npt.NDArray[np.uint8], axis: int) -> Array:
        """What the ramp became along x (axis 0) or y (axis 1), 0..1; NaN where there is padding."""
        ramp = np.broadcast_to(levels[None, :] if axis == 0 else levels[:, None], (height, width))
        seen = (_processed(processor, ramp) - black) / np.where(is_picture, contrast, 1)
        lines = seen if axis == 0 else seen.T
        is_seen = is_picture if axis == 0 else is_picture.T
        middle = lines[is_seen.any(axis=1)]
        line: Array = middle[len(middle) // 2]
        return np.where(is_seen.any(axis=0), line, np.float32(np.nan))

    left, right = _edges(lambda levels: profile(levels, 0), width)
    top, bottom = _edges(lambda levels: profile(levels, 1), height)
    return Frame(left=left, top=top, right=right, bottom=bottom, width=width, height=height)


def _edges(profile: Callable[[npt.NDArray[np.uint8]], Array], length: int) -> tuple[float, float]:
    """Where the input begins and ends along one axis, in pixels of the picture."""
    start, stop = 0.0, float(length)
    first, last = start, stop
    # Twice: 256 grey levels over the whole picture, then over the part that the first pass found.
    for _ in range(2):
        scale = stop - start
        positions = (np.arange(length) + 0.5 - start) / scale
        shares = profile(np.rint(np.clip(positions, 0, 1) * 255).astype(np.uint8))
        # The ends of the ramp are clipped, and filters meet the picture's edge there.
        inner = np.flatnonzero((shares > 0.06) & (shares < 0.94))
        if len(inner) < 2:
            break  # a picture of one or two pixels has no ramp
        slope, offset = np.polyfit(inner + 0.5, shares[inner], 1)
        if slope <= 0:
            raise ValueError(
                "The image processor turns or mirrors pictures; maps can only be drawn for one "
                "that resizes, crops and pads."
            )
        first, last = start + offset * scale, start + (offset + slope * len(shares)) * scale
        start, stop = max(first, 0.0), min(last, float(length))
    return float(first), float(last)


def _processed(processor: ImageProcessor, levels: npt.NDArray[np.uint8]) -> Array:
    """The first channel of what the model would see of a grey picture, (H, W)."""
    picture = Image.fromarray(np.ascontiguousarray(levels)).convert("RGB")
    pixels = processor(images=[picture], return_tensors="pt")["pixel_values"]
    # LLaVA-NeXT's processor gives an image's tiles behind its overview.
    channel: Array = pixels.flatten(0, -4)[0, 0].float().numpy()
    return channel
