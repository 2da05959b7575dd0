"""The former place of `moellava.images.load_image`."""

from moellava.images import MAX_PIXELS, PLANES, WINDOWS, load_image

__all__ = ["MAX_PIXELS", "PLANES", "WINDOWS", "load_image"]
