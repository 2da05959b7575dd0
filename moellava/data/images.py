"""The dataset's entrance to images: `load_image`, whatever the row holds."""

from typing import Any

from PIL import Image

from moellava.encoders.images import to_eight_bit, to_pil


def load_image(source: Any) -> Image.Image:
    """An 8-bit RGB image of a path, encoded bytes, an array or a PIL image."""
    return to_eight_bit(to_pil(source)).convert("RGB")
