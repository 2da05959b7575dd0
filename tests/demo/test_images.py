"""The demo's pictures: every modality, and no pixel of a held-out part in a training part."""

import itertools

import numpy as np
import pytest

from moellava.demo.images import MODALITIES, load_sources, sample_crops


@pytest.fixture(scope="module")
def sources():
    return load_sources()


def test_every_modality_has_images(sources):
    assert {source.modality for source in sources} == set(MODALITIES)


def windows(region: np.ndarray, side: int = 12, step: int = 7) -> set[bytes]:
    """Windows of a region that hold a picture, every `step`-th of a grid of one pixel."""
    grey = region[..., 0]
    views = np.lib.stride_tricks.sliding_window_view(grey, (side, side)).reshape(-1, side, side)
    return {view.tobytes() for view in views[::step] if len(np.unique(view)) > 20}


def test_training_and_held_out_parts_share_no_window(sources):
    for source in sources:
        train = set(itertools.chain.from_iterable(windows(region) for region in source.train))
        held_out = np.concatenate([region.reshape(-1, 3) for region in source.held_out])
        assert held_out.std() > 4, source.name
        for region in source.held_out:
            assert not train & windows(region, step=1), source.name


def test_the_window_check_sees_an_overlap(sources):
    """A held-out part that began 16 columns too early would be found."""
    for source in (sources[0], sources[1]):
        region = source.train[0]
        assert windows(region) & windows(region[:, -16:].copy(), step=1), source.name


def test_crops_are_reproducible_and_show_something(sources):
    first = [np.asarray(image) for _, image in sample_crops(sources, "train", 4, seed=3)]
    again = [np.asarray(image) for _, image in sample_crops(sources, "train", 4, seed=3)]
    assert all(np.array_equal(a, b) for a, b in zip(first, again, strict=True))
    assert min(crop.std() for crop in first) > 8


def is_inside(crop: np.ndarray, region: np.ndarray) -> bool:
    side = crop.shape[0]
    if side > min(region.shape[:2]):
        return False
    views = np.lib.stride_tricks.sliding_window_view(region[..., 0], (side, side))
    return bool((views == crop[..., 0]).all((2, 3)).any())


@pytest.mark.parametrize(("split", "is_mirrored"), [("train", True), ("held_out", False)])
def test_only_training_crops_are_mirrored(split, is_mirrored, sources):
    """An ultrasound's lettering is read as it was written."""
    chosen = [source for source in sources if source.modality == "ultrasound"]
    mirrored = []
    for source, image in sample_crops(sources, split, 8, seed=0):
        if source in chosen:
            regions = source.train if split == "train" else source.held_out
            crop = np.asarray(image)
            as_taken, turned = (
                any(is_inside(seen, region) for region in regions) for seen in (crop, crop[:, ::-1])
            )
            assert as_taken or turned
            mirrored.append(not as_taken)
    assert len(mirrored) == 8
    assert any(mirrored) == is_mirrored
