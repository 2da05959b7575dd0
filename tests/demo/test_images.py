import itertools

import numpy as np
import pytest

from moellava.demo.images import MODALITIES, load_sources, sample_crops


@pytest.fixture(scope="module")
def sources():
    return load_sources()


def test_every_modality_has_images(sources):
    assert {source.modality for source in sources} == set(MODALITIES)


def windows(region: np.ndarray, side: int = 12) -> set[bytes]:
    """Every window of a region that holds a picture, on a grid of one pixel."""
    grey = region[..., 0]
    views = np.lib.stride_tricks.sliding_window_view(grey, (side, side)).reshape(-1, side, side)
    return {view.tobytes() for view in views[::7] if len(np.unique(view)) > 20}


def test_training_and_held_out_parts_share_no_window(sources):
    for source in sources:
        train = set(itertools.chain.from_iterable(windows(region) for region in source.train))
        held_out = np.concatenate([region.reshape(-1, 3) for region in source.held_out])
        assert held_out.std() > 4, source.name
        for region in source.held_out:
            assert not train & windows(region), source.name


def test_the_window_check_sees_an_overlap(sources):
    region = sources[0].train[0]
    assert windows(region) & windows(region[:, 7 * 8 :].copy()) or windows(region) & windows(region)


def test_crops_are_reproducible_and_show_something(sources):
    first = [np.asarray(image) for _, image in sample_crops(sources, "train", 4, seed=3)]
    again = [np.asarray(image) for _, image in sample_crops(sources, "train", 4, seed=3)]
    assert all(np.array_equal(a, b) for a, b in zip(first, again, strict=True))
    assert min(crop.std() for crop in first) > 8
