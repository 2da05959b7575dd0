"""Real medical images from packages' own data, cut into regions for training and for testing.

Training and testing never share a pixel.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TypeAlias, cast

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from moellava.images import to_pil

Pixels: TypeAlias = NDArray[np.uint8]  # (H, W, 3), or (H, W) before a source is made of it

# What the answers call each modality.
MODALITIES = ("CT", "MR", "ultrasound", "histology", "retina photograph", "cell microscopy")


@dataclass(frozen=True)
class Source:
    """One picture or volume: its training part and its held-out part, without a common pixel."""

    name: str
    modality: str
    train: list[Pixels]  # each (H, W, 3)
    held_out: list[Pixels]


def load_sources() -> list[Source]:
    """The images of scikit-image, pydicom and nilearn that their wheels carry, without download."""
    return [*_photographs(), *_dicoms(), *_brain()]


def sample_crops(
    sources: list[Source], split: str, num_per_modality: int, seed: int
) -> Iterator[tuple[Source, Image.Image]]:
    """Random square crops, `num_per_modality` of each modality, in turn from its sources.

    Args:
        split: `train` or `held_out`. Half of the training crops are mirrored, so that there are
            more of them; what the model is asked about is seen as it was taken.
        seed: of the positions, sizes and mirrorings.
    """
    rng = np.random.default_rng(seed)
    for modality in MODALITIES:
        own = [source for source in sources if source.modality == modality]
        for index in range(num_per_modality):
            source = own[index % len(own)]
            regions = source.train if split == "train" else source.held_out
            crop = _random_crop(regions[rng.integers(len(regions))], rng)
            if split == "train" and rng.random() < 0.5:
                crop = crop[:, ::-1]
            yield source, Image.fromarray(np.ascontiguousarray(crop))


def _random_crop(region: Pixels, rng: np.random.Generator) -> Pixels:
    shorter = min(region.shape[:2])
    while True:
        side = int(rng.integers(int(0.6 * shorter), shorter + 1))
        top = int(rng.integers(region.shape[0] - side + 1))
        left = int(rng.integers(region.shape[1] - side + 1))
        crop = region[top : top + side, left : left + side]
        if crop.std() > 8:  # an empty corner of a scan shows nothing that a question could be about
            return crop


def _photographs() -> Iterator[Source]:
    import skimage.data

    def photograph(name: str) -> Pixels:
        load = cast(Callable[[], Pixels], getattr(skimage.data, name))
        return load()

    retina = photograph("retina")[150:-150, 150:-150]
    yield _split_columns("immunohistochemistry", "histology", photograph("immunohistochemistry"))
    yield _split_columns("retina", "retina photograph", retina)
    yield _split_columns("microaneurysms", "retina photograph", photograph("microaneurysms"))
    yield _split_rows("cell", "cell microscopy", photograph("cell"))


def _dicoms() -> Iterator[Source]:
    # Windows (center, width) that show bone and soft tissue; MR files have their own.
    for name, window in (("CT_small.dcm", (500.0, 1400.0)), ("693_J2KI.dcm", (650.0, 1700.0))):
        yield _split_columns(f"pydicom {name}", "CT", _read_dicom(name, window))
    for name in ("MR_small.dcm", "examples_overlay.dcm"):
        yield _split_columns(f"pydicom {name}", "MR", _read_dicom(name))
    picture = _read_dicom("examples_rgb_color.dcm")[60:200]
    yield _split_columns("pydicom examples_rgb_color.dcm", "ultrasound", picture)
    # The frames of one loop are too alike to be split by frame.
    heart = _read_dicom("examples_ybr_color.dcm", frame=0)[30:225, 70:270]
    yield _split_rows("pydicom examples_ybr_color.dcm", "ultrasound", heart)


def _brain() -> Iterator[Source]:
    from nilearn.datasets import load_mni152_template

    volume = load_mni152_template(resolution=2).get_fdata()[10:-10, 10:-10]
    slices = [_eight_bit(np.rot90(volume[:, :, z])) for z in range(20, 76)]
    # Neighbouring slices are nearly equal, so ten of them, 20 mm, lie between the two parts.
    yield Source("nilearn MNI152", "MR", train=slices[:30], held_out=slices[40:])


def _read_dicom(
    name: str, window: tuple[float, float] | None = None, frame: int | None = None
) -> Pixels:
    from pydicom.data import get_testdata_file

    path = str(get_testdata_file(name, download=False))
    return np.asarray(to_pil(path, window=window, frame=frame))


def _eight_bit(shares: NDArray[np.float64]) -> Pixels:
    """Shares of the brightest value, 0..1, as RGB."""
    return _as_rgb((np.clip(shares, 0, 1) * 255).astype(np.uint8))


def _as_rgb(pixels: Pixels) -> Pixels:
    return pixels if pixels.ndim == 3 else np.repeat(pixels[..., None], 3, axis=2)


def _split_columns(name: str, modality: str, pixels: Pixels) -> Source:
    rgb = _as_rgb(pixels)
    middle = int(0.55 * rgb.shape[1])
    return Source(name, modality, train=[rgb[:, :middle]], held_out=[rgb[:, middle:]])


def _split_rows(name: str, modality: str, pixels: Pixels) -> Source:
    turned = _split_columns(name, modality, np.swapaxes(pixels, 0, 1))
    return Source(
        name,
        modality,
        train=[np.swapaxes(region, 0, 1) for region in turned.train],
        held_out=[np.swapaxes(region, 0, 1) for region in turned.held_out],
    )
