"""What Pillow reads (PNG, JPEG, TIFF, GIF, ...), seen through the frame and window asked for."""

import io
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from PIL import ExifTags, Image, ImageFile, UnidentifiedImageError

from moellava.images.eight_bit import to_eight_bit
from moellava.images.view import View, grid_shape, window_to_eight_bit

_Turn = Image.Transpose
# By the EXIF orientation.
_TURNS = {
    2: _Turn.FLIP_LEFT_RIGHT,
    3: _Turn.ROTATE_180,
    4: _Turn.FLIP_TOP_BOTTOM,
    5: _Turn.TRANSPOSE,
    6: _Turn.ROTATE_270,
    7: _Turn.TRANSVERSE,
    8: _Turn.ROTATE_90,
}
_EXIF_KEYS = ("exif", "Raw profile type exif", "XML:com.adobe.xmp", "xmp")  # of Pillow's `info`


def decode_picture(source: Path | bytes, view: View, name: str) -> Image.Image:
    """A file or its bytes, in the mode that the file has.

    Raises:
        ValueError: broken, too large, or without the frame or window asked for.
    """
    with _opened(source, name) as image:
        view.check_size(*image.size, name)  # Pillow has read the header only
        chosen = seen(image, view, name)
        chosen.load()
        return chosen.copy() if chosen is image and image.fp is not None else chosen


def count_frames(source: Path | bytes | Image.Image, name: str) -> int:
    """The frames of an animation or TIFF; no pixels are decoded.

    Raises:
        ValueError: broken.
    """
    if isinstance(source, Image.Image):
        return int(getattr(source, "n_frames", 1))
    with _opened(source, name) as image:
        return int(getattr(image, "n_frames", 1))


@contextmanager
def _opened(source: Path | bytes, name: str) -> Iterator[ImageFile.ImageFile]:
    try:
        file = io.BytesIO(source) if isinstance(source, bytes) else source
        with Image.open(file, formats=_formats()) as image:
            yield image
    except Image.DecompressionBombError as error:
        raise ValueError(
            f"{name} is larger than Pillow's limit: {error} "
            "Give it smaller, or set PIL.Image.MAX_IMAGE_PIXELS."
        ) from error
    except UnidentifiedImageError as error:
        raise ValueError(f"{name} cannot be read as an image: its format is unknown.") from error


def _formats() -> list[str]:
    """All that Pillow reads but EPS, for which it would start Ghostscript on the file."""
    Image.init()
    return [name for name in Image.ID if name != "EPS"]


def seen(image: Image.Image, view: View, name: str) -> Image.Image:
    """The frame asked for of an animation or TIFF, or the first, seen through the window.

    The picture is turned as its EXIF orientation says.
    """
    view.refuse_plane(name)
    view.check_size(*image.size, name)
    if view.frame is not None:
        count = getattr(image, "n_frames", 1)
        frames = view.frames(count, name, default=0)
        if len(frames) > 1:
            return _grid(image, frames, view, name)
        if count > 1:
            image.seek(frames[0])
    return _through_window(image, view, name)


def windowed(values: np.ndarray, view: View, name: str) -> np.ndarray:
    """Grey values (H, W) seen through the window of a view that has one, in 8 bits."""
    if values.ndim != 2:
        raise ValueError(f"{name} is in colour; a window is for grey images. Leave window out.")
    if view.window == "full":
        return np.asarray(to_eight_bit(Image.fromarray(values)))
    view.refuse_preset(values.dtype, name)
    limits = view.limits()
    if limits is None:
        raise ValueError(
            f"{name} has no windows of its own to number. Give (center, width) or a preset."
        )
    return window_to_eight_bit(values, *limits)


def _orientation(image: Image.Image) -> int:
    """The EXIF orientation, 1 to 8; 1 if there is none that can be read."""
    try:
        orientation = image.getexif().get(ExifTags.Base.Orientation)
    except MemoryError:
        raise
    except Exception:  # whatever a broken block of EXIF leads Pillow to; the picture may be sound
        return 1
    return orientation if isinstance(orientation, int) and orientation in _TURNS else 1


def _upright(image: Image.Image) -> Image.Image:
    """Turned as the EXIF orientation says, without EXIF then.

    `PIL.ImageOps.exif_transpose` does the same, but fails where it cannot write the EXIF anew.
    """
    image.load()  # Pillow turns a TIFF as it loads it, and forgets the orientation
    if (orientation := _orientation(image)) == 1:
        return image
    turned = image.transpose(_TURNS[orientation])
    for key in _EXIF_KEYS:
        turned.info.pop(key, None)
    return turned


def _through_window(image: Image.Image, view: View, name: str) -> Image.Image:
    image = _upright(image)
    if view.window is None and view.channels is None:
        return image
    if image.mode.startswith("P"):
        raise ValueError(f"{name} has a palette; a window is for grey images. Leave window out.")
    values = np.asarray(image)
    return Image.fromarray(view.in_channels(lambda one: windowed(values, one, name)))


def _grid(image: Image.Image, frames: Sequence[int], view: View, name: str) -> Image.Image:
    """The frames side by side, in cells as large as the largest: those of a TIFF may differ."""
    rows, columns = grid_shape(len(frames))
    sizes = []
    for frame in frames:  # of the headers: none is decoded yet
        image.seek(frame)
        is_turned = _orientation(image) >= 5
        sizes.append(image.size[::-1] if is_turned else image.size)
    width, height = (max(side) for side in zip(*sizes, strict=True))
    view.check_size(columns * width, rows * height, name)
    grid = Image.new("RGB", (columns * width, rows * height))
    for index, frame in enumerate(frames):
        image.seek(frame)
        row, column = divmod(index, columns)
        picture = to_eight_bit(_through_window(image, view, name)).convert("RGB")
        grid.paste(picture, (column * width, row * height))
    return grid
