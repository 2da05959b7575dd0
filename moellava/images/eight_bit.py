"""Grey values and arrays → 8 bits: `to_eight_bit` for PIL images, `array_to_pil` for arrays."""

from collections.abc import Callable

import numpy as np
from PIL import Image

# Modes that open_clip's transform resizes as they are; everything else is brought to 8 bits first.
_RESIZED_AS_THEY_ARE = ("L", "LA", "RGB", "RGBA", "RGBX", "CMYK", "YCbCr", "HSV", "LAB")
_BLOCK = 1 << 20  # values worked on at a time


def to_eight_bit(image: Image.Image) -> Image.Image:
    """Bring palette, bilevel, 16-bit and float images to 8 bits; others come back as they are.

    16-bit grey is scaled by the range of its type (0..65535 to 0..255), never clamped and never
    stretched to the image's own extremes, so the same grey value gives the same result in every
    image.
    """
    if image.mode in _RESIZED_AS_THEY_ARE:
        return image
    if image.mode == "1":
        return image.convert("L")
    # "I;16", its byte orders, and "I", as which some 16-bit files open.
    if image.mode.startswith("I"):
        values = np.asarray(image)
        low, high = int(values.min()), int(values.max())
        if low < 0 or high > 65535:
            raise ValueError(
                f"The {image.mode!r} image has values {low} to {high}; "
                "expected 16 bits, 0 to 65535. "
                "Apply a window first, so that 8 bits hold what matters."
            )
        return Image.fromarray(by_rows(_from_sixteen_bits, values))
    if image.mode == "F":
        return array_to_pil(np.asarray(image))
    # "P", "PA" and the rest: colours, not indices, are what resizing may mix.
    return image.convert("RGB")


def by_rows(function: Callable[[np.ndarray], np.ndarray], values: np.ndarray) -> np.ndarray:
    """uint8 of the shape of `values`: `function` of a few rows at a time.

    The steps in between take 8 bytes or more for each value, which is too much for all at once.
    """
    shown = np.empty(values.shape, np.uint8)
    step = max(1, _BLOCK // max(1, values[:1].size))
    for top in range(0, len(values), step):
        shown[top : top + step] = function(values[top : top + step])
    return shown


def _from_sixteen_bits(values: np.ndarray) -> np.ndarray:
    return ((values.astype(np.uint32) * 255 + 32767) // 65535).astype(np.uint8)


def array_to_pil(array: np.ndarray) -> Image.Image:
    """An 8-bit PIL image of an array (H, W), (H, W, C) or (C, H, W); see `to_pil`."""
    if array.ndim == 3 and array.shape[0] in (1, 3, 4) and array.shape[2] not in (1, 3, 4):
        array = np.moveaxis(array, 0, -1)
    if array.ndim == 3 and array.shape[2] == 1:
        array = array[:, :, 0]
    if (
        array.ndim not in (2, 3)
        or (array.ndim == 3 and array.shape[2] not in (3, 4))
        or 0 in array.shape
    ):
        raise ValueError(
            f"An image array has shape {array.shape}; "
            "expected (H, W), or 1, 3 or 4 channels first or last."
        )
    if array.dtype == np.bool_:
        array = array.astype(np.uint8) * 255
    elif array.dtype == np.uint16:
        array = by_rows(_from_sixteen_bits, array)
    elif np.issubdtype(array.dtype, np.floating):
        low, high = float(array.min()), float(array.max())
        if not (low >= 0 and high <= 1):  # also false for NaN
            raise ValueError(f"A float image has values {low:g} to {high:g}; expected 0 to 1.")
        array = by_rows(lambda rows: np.rint(rows * 255).astype(np.uint8), array)
    elif array.dtype != np.uint8:
        raise ValueError(
            f"An image array has dtype {array.dtype}; expected uint8, uint16, or float in 0..1."
        )
    return Image.fromarray(np.ascontiguousarray(array))
