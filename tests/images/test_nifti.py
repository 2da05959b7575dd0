"""NIfTI against nibabel's own canonical volumes."""

import itertools
from pathlib import Path

import nibabel
import numpy as np
import pytest

from moellava.images import View, to_pil
from moellava.images.nifti import decode_nifti

SHIPPED = Path(nibabel.__file__).parent / "tests" / "data"
PLANES = ("sagittal", "coronal", "axial")


@pytest.fixture
def volume() -> np.ndarray:
    """(right, anterior, superior) uint8, no two axes of one length."""
    return np.random.default_rng(0).integers(0, 256, (9, 11, 13), dtype=np.uint8)


def save(path: Path, values: np.ndarray, affine=None, **header) -> Path:
    image = nibabel.Nifti1Image(values, np.eye(4) if affine is None else affine)
    for key, value in header.items():
        image.header[key] = value
    nibabel.save(image, path)
    return path


def shown(source, **view) -> np.ndarray:
    return np.asarray(decode_nifti(source, View(**view), str(source)))


def test_slices_are_seen_as_radiologists_see_them(tmp_path):
    """Patient's right on the left; front at the top of an axial slice, else the head."""
    values = np.zeros((5, 6, 7), np.uint8)
    values[4, 5, 6] = 255  # furthest right, front, head
    path = save(tmp_path / "a.nii", values)
    for plane, frame, shape in (
        ("axial", 6, (6, 5)),
        ("coronal", 5, (7, 5)),
        ("sagittal", 4, (7, 6)),
    ):
        picture = shown(path, plane=plane, frame=frame)
        assert picture.shape == shape
        assert picture[0, 0] == 255
        assert shown(path, plane=plane, frame=0).max() == 0


@pytest.mark.parametrize("plane", PLANES)
def test_the_picture_does_not_depend_on_how_the_file_is_stored(tmp_path, volume, plane):
    """All 48 ways to store one volume, against nibabel's canonical form of it."""
    canonical = nibabel.Nifti1Image(volume, np.eye(4))
    for order in itertools.permutations(range(3)):
        for flips in itertools.product((1, -1), repeat=3):
            stored = canonical.as_reoriented(np.stack([order, flips], axis=1))
            array = nibabel.as_closest_canonical(stored).get_fdata()
            axis = PLANES.index(plane)
            expected = np.take(array, 4, axis=axis)[::-1, ::-1].T
            assert np.array_equal(shown(stored, plane=plane, frame=4), expected), (order, flips)


def test_gzipped_files_and_images_in_memory_give_the_same(tmp_path, volume):
    plain, packed = (save(tmp_path / name, volume) for name in ("a.nii", "a.nii.gz"))
    for source in (packed, nibabel.load(plain), str(plain)):
        assert np.array_equal(
            np.asarray(to_pil(source, frame=3)), np.asarray(to_pil(plain, frame=3))
        )


def test_the_middle_slice_is_the_default_and_a_grid_is_in_order(tmp_path, volume):
    path = save(tmp_path / "a.nii", volume)
    assert np.array_equal(shown(path), shown(path, frame=6))
    grid = shown(path, frame="grid:4")
    assert grid.shape == (22, 18)
    assert np.array_equal(grid[:11, :9], shown(path, frame=0))
    assert np.array_equal(grid[11:, 9:], shown(path, frame=12))


def test_a_window_is_in_hounsfield_units_after_the_headers_scaling(tmp_path):
    stored = np.arange(0, 3000, dtype=np.int16).reshape(50, 60, 1)
    image = nibabel.Nifti1Image(stored, np.eye(4))
    image.header.set_slope_inter(1, -1024)
    nibabel.save(image, tmp_path / "ct.nii.gz")
    hounsfield = nibabel.load(tmp_path / "ct.nii.gz").get_fdata()[::-1, ::-1, 0].T
    assert hounsfield.min() == -1024
    for window, center, width in (("lung", -600, 1500), ((40.0, 80.0), 40, 80)):
        expected = np.rint(np.clip((hounsfield - (center - width / 2)) / width, 0, 1) * 255)
        assert np.array_equal(shown(tmp_path / "ct.nii.gz", window=window), expected)


def test_the_headers_display_range_is_used_where_it_has_one(tmp_path):
    values = np.linspace(-5, 20, 120, dtype=np.float32).reshape(10, 12, 1)
    path = save(tmp_path / "a.nii", values, cal_min=0, cal_max=10)
    expected = np.rint(np.clip(values[::-1, ::-1, 0].T.astype(np.float64) / 10, 0, 1) * 255)
    assert np.array_equal(shown(path), expected)


def test_without_a_range_the_percentiles_of_finite_values_are_shown(tmp_path):
    values = np.linspace(0, 1000, 120, dtype=np.float32).reshape(10, 12, 1)
    values[3, 3, 0] = np.nan
    low, high = np.nanpercentile(values.astype(np.float64), (0.5, 99.5))
    expected = np.rint(np.nan_to_num(np.clip((values - low) / (high - low), 0, 1)) * 255)[
        ::-1, ::-1, 0
    ].T
    assert np.abs(shown(save(tmp_path / "a.nii", values)).astype(int) - expected).max() <= 1


def test_pixels_that_are_not_square_are_made_so(tmp_path, volume):
    path = save(tmp_path / "thick.nii", volume, np.diag([1, 1, 4, 1]))
    assert shown(path, plane="axial").shape == (11, 9)
    assert shown(path, plane="coronal").shape == (52, 9)


def test_only_the_slice_that_is_shown_is_read(tmp_path, volume, monkeypatch):
    image = nibabel.load(save(tmp_path / "a.nii", volume))
    monkeypatch.setattr(
        type(image.dataobj), "__array__", lambda *args, **kwargs: pytest.fail("the whole was read")
    )
    assert shown(image, frame=2).shape == (11, 9)


def test_a_time_is_chosen_by_volume(tmp_path):
    values = np.random.default_rng(1).integers(0, 256, (5, 6, 7, 3), dtype=np.uint8)
    path = save(tmp_path / "times.nii", values)
    for volume in range(3):
        assert np.array_equal(shown(path, frame=1, volume=volume), values[::-1, ::-1, 1, volume].T)
    with pytest.raises(ValueError, match=r"times\.nii has no volume 3: it has 3"):
        shown(path, volume=3)


@pytest.mark.parametrize(
    "name", ["anatomical.nii", "functional.nii", "example4d.nii.gz", "example_nifti2.nii.gz"]
)
@pytest.mark.parametrize("plane", PLANES)
def test_nibabels_own_files_have_contrast(name, plane):
    assert np.ptp(shown(SHIPPED / name, plane=plane).astype(int)) > 100


def test_a_real_brain_stands_upright():
    """nilearn's MNI template: from the front, the skull is wider than the neck."""
    from nilearn.datasets import load_mni152_template

    image = load_mni152_template(resolution=4)
    picture = shown(image, plane="coronal")
    rows = (picture > 60).sum(axis=1)
    height = len(rows)
    assert rows[: height // 2].sum() > 1.5 * rows[3 * height // 4 :].sum()


def test_rgb_volumes_stay_in_colour(tmp_path):
    colours = np.zeros((4, 5, 1), dtype=[("R", "u1"), ("G", "u1"), ("B", "u1")])
    colours["R"], colours["B"] = 200, 7
    nibabel.save(nibabel.Nifti1Image(colours, np.eye(4)), tmp_path / "rgb.nii")
    assert shown(tmp_path / "rgb.nii").tolist() == [[[200, 0, 7]] * 4] * 5
    with pytest.raises(ValueError, match="in colour"):
        shown(tmp_path / "rgb.nii", window=(40, 80))


def test_errors_say_what_is_wrong(tmp_path, volume):
    path = save(tmp_path / "a.nii", volume)
    with pytest.raises(ValueError, match=r"a\.nii has no frame 13: it has 13, 0 to 12"):
        shown(path, frame=13)
    with pytest.raises(ValueError, match=r"Unknown plane 'axail'. Did you mean 'axial'"):
        shown(path, plane="axail")
    with pytest.raises(ValueError, match=r"no windows to number"):
        shown(save(tmp_path / "b.nii", volume.astype(np.int16)), window=0)
    flat = save(tmp_path / "flat.nii", volume[:, :, 0])
    with pytest.raises(ValueError, match=r"has the shape \(9, 11\); expected a volume"):
        shown(flat)
    for name, content in (
        ("text.nii", b"no volume"),
        ("cut.nii", path.read_bytes()[:700]),
        ("z.nii.gz", b"\x1f\x8bxx"),
    ):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(ValueError, match=rf"{name} cannot be read as NIfTI"):
            to_pil(tmp_path / name)


def test_without_nibabel_the_error_says_what_to_install(monkeypatch, tmp_path, volume):
    import sys

    path = save(tmp_path / "a.nii", volume)
    monkeypatch.setitem(sys.modules, "nibabel", None)
    with pytest.raises(
        ImportError, match=r"a\.nii is a NIfTI file\. .* pip install 'moellava\[nifti\]'"
    ):
        to_pil(path)
