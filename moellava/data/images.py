"""The dataset's entrance to images: `load_image`, whatever a row holds."""

from typing import Any

from PIL import Image

from moellava.images import MAX_PIXELS, PLANES, WINDOWS, to_eight_bit, to_pil
from moellava.images.view import Frame, Window

__all__ = ["MAX_PIXELS", "PLANES", "WINDOWS", "load_image"]


def load_image(
    source: Any,
    *,
    window: Window | None = None,
    frame: Frame | None = None,
    plane: str = "axial",
    volume: int = 0,
    max_pixels: int = MAX_PIXELS,
) -> Image.Image:
    """An 8-bit RGB image of a path (DICOM and NIfTI included), encoded bytes, an array or a PIL image.

    Args:
        window, frame, plane, volume, max_pixels: see `moellava.images.View`.

    Raises:
        ValueError: unreadable, empty, too large, or without the frame or window asked for; the file is named.
    """
    options: Any = {
        "window": window,
        "frame": frame,
        "plane": plane,
        "volume": volume,
        "max_pixels": max_pixels,
    }
    return to_eight_bit(to_pil(source, **options)).convert("RGB")
