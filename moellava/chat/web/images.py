"""Uploaded files → images of the page, each with the slice and window that are shown of it.

| name | gives |
|---|---|
| `PageImage` | a file or a stack of slices, with the present view |
| `read_uploads` | the images among uploaded files, and why the others are none |
| `as_seen` | the pixels that the model gets of a picture |
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from PIL import Image

from moellava.images import (
    WINDOWS,
    ImageInfo,
    ViewOptions,
    describe_image,
    sort_series,
    to_eight_bit,
    to_pil,
)
from moellava.model.prompts import ChatModel
from moellava.model.turns import read_picture

OWN, CUSTOM = "the file's own", "center and width"  # choices of a window beside the presets


@dataclass(eq=False)
class PageImage:
    """An image that was uploaded.

    Args:
        files: one file, or the slices of a DICOM series in order.
        info: of the file, or of the middle slice.
        view: `window`, `frame` and `plane`, as `moellava.images.View` takes them.
        sent: the view that the model has been asked about last; None if it has not been.
    """

    files: list[Path]
    info: ImageInfo
    max_pixels: int
    view: ViewOptions = field(default_factory=ViewOptions)
    sent: ViewOptions | None = None

    def __post_init__(self) -> None:
        if self.planes:
            self.view["plane"] = self.planes[0]
        if self.num_frames > 1:
            self.view["frame"] = self.num_frames // 2

    @property
    def planes(self) -> tuple[str, ...]:
        return self.info.planes

    @property
    def num_frames(self) -> int:
        """Slices or frames to choose from, in the present plane."""
        if len(self.files) > 1:
            return len(self.files)
        return self.info.num_frames[self.view.get("plane") or ""]

    @property
    def frame(self) -> int:
        return int(self.view.get("frame") or 0)

    @property
    def name(self) -> str:
        """The name of the first file, and how many slices there are."""
        name = self.files[0].name
        return f"{name} ({self.num_frames} slices)" if self.num_frames > 1 else name

    @property
    def is_waiting(self) -> bool:
        """Whether it goes with the next question: it is new, or its view has changed."""
        return self.sent != self.view

    @property
    def windows(self) -> tuple[str, ...]:
        """The choices of a window; none if a window means nothing."""
        if self.info.grey_range is None:
            return ()
        return (OWN, *(WINDOWS if self.info.is_ct else ()), CUSTOM)

    @property
    def window_name(self) -> str:
        """The present choice among `windows`."""
        window = self.view.get("window")
        if window is None:
            return OWN
        return window if isinstance(window, str) else CUSTOM

    @property
    def center_and_width(self) -> tuple[float, float]:
        """Of the present window, as far as it is known."""
        window = self.view.get("window")
        if isinstance(window, str):
            return WINDOWS[window]
        if isinstance(window, tuple):
            return window
        low, high = self.info.grey_range or (0.0, 1.0)
        return self.info.window or ((low + high) / 2, max(high - low, 1.0))

    def choose_plane(self, plane: str) -> None:
        """Show the middle slice of another plane."""
        self.view["plane"] = plane
        self.view["frame"] = self.num_frames // 2

    def choose_frame(self, frame: int) -> None:
        """Show another slice; numbers beyond the ends are the ends."""
        self.view["frame"] = min(max(frame, 0), self.num_frames - 1)

    def choose_window(self, name: str) -> None:
        """Show the greys of a preset, the file's own, or those shown now as numbers."""
        if name == OWN:
            self.view.pop("window", None)
        else:
            self.view["window"] = self.center_and_width if name == CUSTOM else name

    def choose_greys(self, center: float, width: float) -> None:
        """Show a window by its numbers."""
        self.view["window"] = (center, max(width, 1.0))

    def picture(self, max_side: int | None = None) -> Image.Image:
        """What is shown now, in 8 bits; not larger than asked for."""
        source, view = self.source()
        view["max_pixels"] = self.max_pixels
        picture = to_eight_bit(to_pil(source, **view))
        if max_side is not None:
            picture = picture.convert("RGB")
            picture.thumbnail((max_side, max_side))
        return picture

    def source(self) -> tuple[Path, ViewOptions]:
        """The file that is shown now, and the options for reading it."""
        view = self.view.copy()
        if len(self.files) > 1:
            view.pop("frame")
            return self.files[self.frame], view
        return self.files[0], view


def read_uploads(paths: Sequence[Path], max_pixels: int) -> tuple[list[PageImage], list[str]]:
    """Images of uploaded files, and one message for each file that is not one."""
    found = [_read(files, max_pixels) for files in sort_series(paths)]
    images = [item for item in found if isinstance(item, PageImage)]
    return images, [item for item in found if isinstance(item, str)]


def as_seen(loaded: ChatModel, picture: Image.Image) -> Image.Image:
    """The pixels that the model's image tower gets of a picture: cropped, resized and rounded.

    Views of a picture stand next to each other: its overview, and its tiles as they lie.
    """
    seen = read_picture(loaded.processor, picture)
    processor = loaded.processor.image_processor
    mean, std = (
        torch.tensor(getattr(processor, name, None) or default).view(-1, 1, 1)
        for name, default in (("image_mean", (0.0,) * 3), ("image_std", (1.0,) * 3))
    )
    pixels = seen.inputs["pixel_values"].float()  # (V, 3, H, W)
    levels = ((pixels * std + mean).clamp(0, 1) * 255).round().to(torch.uint8)
    views = [Image.fromarray(view.permute(1, 2, 0).contiguous().numpy()) for view in levels]
    rows, columns = loaded.processor.grid(picture.size)
    num_before = len(views) - rows * columns  # 1 with an overview
    width, height = views[0].size
    sheet = Image.new("RGB", ((num_before + columns) * width, rows * height))
    for number, view in enumerate(views):
        row, column = divmod(number - num_before, columns) if number >= num_before else (0, -1)
        sheet.paste(view, ((num_before + column) * width, row * height))
    return sheet


def _read(files: list[Path], max_pixels: int) -> PageImage | str:
    """The image, or why it is none, by the name that the user gave the file."""
    middle = files[len(files) // 2]
    try:
        image = PageImage(files, describe_image(middle, max_pixels=max_pixels), max_pixels)
        image.picture()  # an unreadable file is said at once
        return image
    except (ValueError, OSError, ImportError) as error:
        return " ".join(str(error).split()).replace(str(middle), middle.name)
