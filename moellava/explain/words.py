"""Words on patches: a map per text of where an image tower finds it, and how often it points right.

| name | what it gives |
|---|---|
| `draw_words` | `encoder.patch_similarity` on the original picture |
| `points_inside` | whether a map's highest patch lies in a mask: one round of the pointing game |
"""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import numpy as np
import numpy.typing as npt
from PIL import Image
from torch import Tensor

from moellava.explain.drawing.overlays import draw_maps
from moellava.explain.frames import Frame, ImageProcessor, measure_frame
from moellava.images import to_eight_bit, to_pil

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Array = npt.NDArray[np.float32]


class WordEncoder(Protocol):
    """What is needed of an encoder: `BiomedClipEncoder` with `load_text=True` has it."""

    @property
    def image_processor(self) -> ImageProcessor: ...

    def patch_similarity(
        self, image: Image.Image, texts: Sequence[str], *, attention: str = "own"
    ) -> Tensor: ...


def draw_words(
    encoder: WordEncoder,
    image: Image.Image | str | Path,
    texts: Sequence[str],
    *,
    attention: str = "own",
    smooth: bool = False,
    path: Path | str | None = None,
) -> "Figure":
    """One overlay per text: where its similarity exceeds that of the other texts.

    The mean over texts is subtracted, since the similarities themselves hardly differ between
    patches, and then the mean over patches, which stands in brackets behind the text. Look at the
    scale: small differences are drawn, too.
    """
    picture = to_pil(image)
    similarity = encoder.patch_similarity(picture, texts, attention=attention).float().cpu().numpy()
    contrast = text_contrast(similarity)
    means = contrast.mean((1, 2))
    return draw_maps(
        to_eight_bit(picture).convert("RGB"),
        measure_frame(encoder.image_processor, picture.size),
        list(contrast - means[:, None, None]),
        [f"{text} ({mean:+.3f})" for text, mean in zip(texts, means, strict=True)],
        label="cosine similarity, less the means over texts and patches",
        is_signed=True,
        title=None,
        smooth=smooth,
        path=path,
    )


def text_contrast(similarity: Array) -> Array:
    """(texts, rows, columns) less the mean over texts; a single text less its own mean."""
    axes = (0,) if len(similarity) > 1 else (1, 2)
    contrast: Array = similarity - similarity.mean(axes, keepdims=True)
    return contrast


def points_inside(values: Array, frame: Frame, mask: npt.NDArray[np.bool_]) -> bool:
    """Whether the centre of the highest patch lies in a mask of the picture (arXiv 1608.00507).

    Args:
        values: (rows, columns).
        mask: (H, W) of the original picture.
    """
    row, column = np.unravel_index(int(np.argmax(values)), values.shape)
    x = frame.left + (column + 0.5) / values.shape[1] * (frame.right - frame.left)
    y = frame.top + (row + 0.5) / values.shape[0] * (frame.bottom - frame.top)
    if not (0 <= x < frame.width and 0 <= y < frame.height):
        return False
    return bool(mask[int(y), int(x)])
