"""What a view shows: windows, frames, and how they are laid out."""

import nibabel
import numpy as np
import pytest
from PIL import Image

from moellava.images import WINDOWS, View, load_image
from moellava.images.view import montage, percentile_range, value_counts


def test_a_grid_is_spread_from_the_first_to_the_last():
    assert View(frame="grid:4").frames(30, "x") == [0, 10, 19, 29]
    assert View(frame="grid").frames(3, "x") == [0, 1, 2]
    assert len(View(frame="grid").frames(100, "x")) == 16


def test_a_montage_is_filled_row_by_row_and_black_beyond():
    pictures = [np.full((2, 3), value, np.uint8) for value in (1, 2, 3, 4, 5)]
    grid = montage(iter(pictures), 5)
    assert grid[::2, ::3].tolist() == [[1, 2, 3], [4, 5, 0]]


def test_an_unknown_preset_is_answered_with_all_of_them_and_their_values():
    with pytest.raises(ValueError, match=r"Unknown window 'lnug'. Did you mean 'lung'") as error:
        View(window="lnug")
    for name, (center, width) in WINDOWS.items():
        assert f"{name} ({center}, {width})" in str(error.value)


@pytest.mark.parametrize("window", [(float("nan"), 400), (40, float("inf")), (40,), (40, 0), []])
def test_a_window_without_a_center_and_a_width_is_refused(window):
    with pytest.raises(ValueError, match="width of at least 1"):
        View(window=window)


@pytest.mark.parametrize("frame", [1.5, True, [1], b"grid"])
def test_a_frame_that_is_not_a_number_or_a_grid_is_refused(frame):
    with pytest.raises(ValueError, match=r"frame is a \w+; expected a whole number, 'grid'"):
        View(frame=frame)


@pytest.mark.parametrize("window", [*WINDOWS, "full", 0, (128, 100)])
@pytest.mark.parametrize("kind", ["file", "array", "sixteen bits", "palette", "nifti"])
def test_values_without_sign_take_no_preset_in_hounsfield_units(tmp_path, window, kind):
    """8-bit pictures have lost the units; (center, width) is in their own, 0 to 255."""
    values = np.arange(240, dtype=np.uint8).reshape(12, 20)
    source: object = tmp_path / ("a.nii" if kind == "nifti" else "a.png")
    if kind == "array":
        source = values
    elif kind == "nifti":
        nibabel.save(nibabel.Nifti1Image(values[..., None], np.eye(4)), source)
    else:
        picture = Image.fromarray(values.astype(np.uint16) if kind == "sixteen bits" else values)
        (picture.convert("P") if kind == "palette" else picture).save(source)
    if window in WINDOWS or (window == 0 and kind != "palette"):
        with pytest.raises(ValueError, match=r"have no sign|no windows|palette"):
            load_image(source, window=window)
    elif kind == "palette":
        with pytest.raises(ValueError, match=r"a\.png has a palette; a window is for grey images"):
            load_image(source, window=window)
    elif window == "full":
        load_image(source, window=window)
    else:
        shown = np.asarray(load_image(source, window=window))[..., 0]
        expected = np.rint(np.clip((values - 78.0) / 100, 0, 1) * 255)
        assert np.array_equal(np.sort(shown, axis=None), np.sort(expected, axis=None))


@pytest.mark.parametrize("dtype", [np.uint8, np.int8, np.uint16, np.int16, np.float32])
def test_percentiles_of_counted_values_equal_numpys(dtype):
    random = np.random.default_rng(0)
    for size in (1, 2, 7, 400):
        values = (random.normal(0, 60, (size, 5)) ** 2).astype(dtype)
        low, high = np.percentile(values.astype(np.float64), (0.5, 99.5))
        assert np.allclose(percentile_range(*value_counts(values)), (low, high))


def test_percentiles_of_extremes_do_not_overflow():
    values = np.array([[-32768] * 50 + [32767] * 50], np.int16)
    assert percentile_range(*value_counts(values)) == (-32768, 32767)
    assert percentile_range(*value_counts(np.full((3, 3), 7, np.int16))) == (7, 7)
    assert percentile_range(np.array([np.nan, np.inf])) == (0, 1)
