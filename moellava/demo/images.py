"""Real medical images from packages' own data, cut into regions that training and testing never share."""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from PIL import Image

# What the answers call each modality.
MODALITIES = ("CT", "MR", "ultrasound", "histology", "retina photograph", "cell microscopy")


@dataclass(frozen=True)
class Source:
    """One picture or volume: its training part and its held-out part, which have no pixel in common."""

    name: str
    modality: str
    train: list[np.ndarray]  # each (H, W, 3) uint8
    held_out: list[np.ndarray]


def load_sources() -> list[Source]:
    """The images of scikit-image, pydicom and nilearn that their wheels carry; nothing is downloaded."""
    return [*_photographs(), *_dicoms(), *_brain()]


def sample_crops(
    sources: list[Source], split: str, num_per_modality: int, seed: int
) -> Iterator[tuple[Source, Image.Image]]:
    """Random square crops, `num_per_modality` of each modality, in turn from its sources.

    Args:
        split: `train` or `held_out`.
        seed: of the positions, sizes and mirrorings.
    """
    rng = np.random.default_rng(seed)
    for modality in MODALITIES:
        own = [source for source in sources if source.modality == modality]
        for index in range(num_per_modality):
            source = own[index % len(own)]
            regions = source.train if split == "train" else source.held_out
            yield source, _random_crop(regions[rng.integers(len(regions))], rng)


def _random_crop(region: np.ndarray, rng: np.random.Generator) -> Image.Image:
    shorter = min(region.shape[:2])
    while True:
        side = int(rng.integers(int(0.6 * shorter), shorter + 1))
        top = int(rng.integers(region.shape[0] - side + 1))
        left = int(rng.integers(region.shape[1] - side + 1))
        crop = region[top : top + side, left : left + side]
        if crop.std() > 8:  # an empty corner of a scan shows nothing that a question could be about
            break
    if rng.random() < 0.5:
        crop = crop[:, ::-1]
    return Image.fromarray(np.ascontiguousarray(crop))


def _photographs() -> Iterator[Source]:
    import skimage.data

    retina = skimage.data.retina()
    yield _split_columns("immunohistochemistry", "histology", skimage.data.immunohistochemistry())
    yield _split_columns("retina", "retina photograph", retina[150:-150, 150:-150])
    yield _split_columns("microaneurysms", "retina photograph", skimage.data.microaneurysms())
    yield _split_rows("cell", "cell microscopy", skimage.data.cell())


def _dicoms() -> Iterator[Source]:
    # The full DICOM chain is the business of a later room; these few files need a rescale, a window, 8 bits.
    for name, low, high in (("CT_small.dcm", -200, 1200), ("693_J2KI.dcm", -200, 1500)):
        yield _split_columns(f"pydicom {name}", "CT", _eight_bit(_read_dicom(name), low, high))
    for name in ("MR_small.dcm", "examples_overlay.dcm"):
        pixels = _read_dicom(name)
        yield _split_columns(
            f"pydicom {name}", "MR", _eight_bit(pixels, *np.percentile(pixels, (1, 99)))
        )
    yield _split_columns(
        "pydicom examples_rgb_color.dcm",
        "ultrasound",
        _read_dicom("examples_rgb_color.dcm")[60:200],
    )
    heart = _read_dicom("examples_ybr_color.dcm")[
        0
    ]  # the frames of one loop are too alike to be split by frame
    yield _split_rows("pydicom examples_ybr_color.dcm", "ultrasound", heart[30:225, 70:270])


def _brain() -> Iterator[Source]:
    from nilearn.datasets import load_mni152_template

    volume = load_mni152_template(resolution=2).get_fdata()
    slices = [_as_rgb(_eight_bit(np.rot90(volume[10:-10, 10:-10, z]), 0, 1)) for z in range(20, 76)]
    # Neighbouring slices are nearly equal, so ten of them, 20 mm, lie between the two parts.
    yield Source("nilearn MNI152", "MR", train=slices[:30], held_out=slices[40:])


def _read_dicom(name: str) -> np.ndarray:
    import pydicom
    from pydicom.data import get_testdata_file
    from pydicom.pixels import apply_modality_lut

    dataset = pydicom.dcmread(str(get_testdata_file(name, download=False)))
    return apply_modality_lut(dataset.pixel_array, dataset)


def _eight_bit(pixels: np.ndarray, low: float, high: float) -> np.ndarray:
    return (np.clip((pixels - low) / (high - low), 0, 1) * 255).astype(np.uint8)


def _as_rgb(pixels: np.ndarray) -> np.ndarray:
    return pixels if pixels.ndim == 3 else np.repeat(pixels[..., None], 3, axis=2)


def _split_columns(name: str, modality: str, pixels: np.ndarray) -> Source:
    rgb = _as_rgb(pixels)
    middle = int(0.55 * rgb.shape[1])
    return Source(name, modality, train=[rgb[:, :middle]], held_out=[rgb[:, middle:]])


def _split_rows(name: str, modality: str, pixels: np.ndarray) -> Source:
    turned = _split_columns(name, modality, np.swapaxes(pixels, 0, 1))
    return Source(
        name,
        modality,
        train=[np.swapaxes(region, 0, 1) for region in turned.train],
        held_out=[np.swapaxes(region, 0, 1) for region in turned.held_out],
    )
