"""DICOM against pydicom's and highdicom's own arrays: every file that pydicom ships, and frames."""

import logging
import warnings
from pathlib import Path

import highdicom
import numpy as np
import pydicom
import pytest
from pydicom.data import get_testdata_files

from moellava.images import to_pil
from moellava.images.dicom_error import DicomError

from .conftest import decoded, dicom_dataset, ramp, shipped

FILES = sorted(
    path
    for path in map(Path, get_testdata_files())
    # All that pydicom ships, many of them without a suffix.
    if path.is_file() and (path.suffix == ".dcm" or path.read_bytes()[128:132] == b"DICM")
)
NO_PICTURE = {
    *(
        "ExplVR_BigEndNoMeta.dcm",
        "ExplVR_LitEndNoMeta.dcm",
        "UN_sequence.dcm",
        "empty_charset_LEI.dcm",
    ),
    *(
        "meta_missing_tsyntax.dcm",
        "nested_priv_SQ.dcm",
        "no_meta.dcm",
        "no_meta_group_length.dcm",
        "priv_SQ.dcm",
    ),
    *(
        "reportsi.dcm",
        "reportsi_with_empty_number_tags.dcm",
        "rtplan.dcm",
        "rtplan_truncated.dcm",
        "rtstruct.dcm",
    ),
    *("test-SR.dcm", "waveform_ecg.dcm"),
}
SPECIFIC = {
    "badVR.dcm": "broken Number of Frames; expected a whole number",
    "MR_truncated.dcm": "8130 vs 8192 bytes",
    "DICOMDIR": "index of a disc",
    "JPEG-lossy.dcm": r"pip install pylibjpeg pylibjpeg-libjpeg",
    "JPGExtended.dcm": r"pip install pylibjpeg pylibjpeg-libjpeg",
    "SC_rgb_jpeg_gdcm.dcm": r"pip install pylibjpeg pylibjpeg-libjpeg",
    "JPEG2000-embedded-sequence-delimiter.dcm": "a frame in it is 3722445056x1024 pixels",
}

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning:pydicom")


def expected_picture(path: Path) -> np.ndarray | None:
    """highdicom's frame, scaled by the range that is known; None if there is none."""
    dataset = pydicom.dcmread(path)
    kind, bits = dataset.PhotometricInterpretation, dataset.BitsStored
    options = {"voi_output_range": (0, 1), "apply_icc_profile": False}
    try:
        frame = highdicom.imread(path).get_frame(1, apply_voi_transform=None, **options)
    except (ValueError, AttributeError):  # big endian, and files without what the standard asks for
        return None
    if kind.startswith("MONOCHROME"):
        has_window = "WindowCenter" in dataset or "VOILUTSequence" in dataset
        return frame * 255 if has_window else frame * 255 / (2**bits - 1) if bits <= 8 else None
    if kind == "PALETTE COLOR":
        return frame.astype(int) >> 8 if frame.max() > 255 else frame
    return frame.astype(float) * 255 / (2**bits - 1)


@pytest.mark.parametrize("path", FILES, ids=lambda path: f"{path.parent.name}/{path.name}")
def test_every_file_that_pydicom_ships_decodes_or_says_why_not(path, caplog):
    """Pixels equal highdicom's to the rounding of ties; messages hold nothing of the patient."""
    caplog.set_level(logging.DEBUG)
    if (
        path.name in NO_PICTURE | SPECIFIC.keys()
        or "TINY_ALPHA" in path.parts
        or path.name.startswith("DICOMDIR")
    ):
        with pytest.raises(DicomError) as error:
            decoded(path, frame=0)
        message = str(error.value)
        assert message.startswith(str(path))
        assert "\n" not in message
        assert_silent_about_the_patient(path, message.removeprefix(str(path)) + caplog.text)
        return
    ours = decoded(path, frame=0)
    assert ours.dtype == np.uint8
    assert_silent_about_the_patient(path, caplog.text)
    theirs = expected_picture(path)
    if theirs is not None:
        assert ours.shape == theirs.shape
        # highdicom takes the window's "width - 1" in stored values, the standard in rescaled ones.
        is_exact = pydicom.dcmread(path).get("RescaleSlope", 1) == 1
        assert np.abs(ours - theirs).max() <= (
            0.5 + 1e-6 if is_exact else 1
        )  # half: float32 against float64 at a tie


def assert_silent_about_the_patient(path: Path, text: str) -> None:
    with warnings.catch_warnings(record=True):
        dataset = pydicom.dcmread(path, force=True, stop_before_pixels=True)
        for element in dataset.iterall():
            is_personal = (
                element.tag.group == 0x0010 or element.VR == "PN" or "ID" in element.keyword
            )
            if (
                is_personal
                and element.VR in ("PN", "LO", "SH", "DA", "UI", "LT")
                and len(str(element.value)) > 3
            ):
                assert str(element.value) not in text, element.keyword


@pytest.mark.parametrize(("name", "message"), SPECIFIC.items())
def test_an_error_names_its_reason(name, message):
    path = next(path for path in FILES if path.name == name)
    with pytest.raises(DicomError, match=message):
        decoded(path)


def test_a_file_without_picture_says_what_it_is():
    with pytest.raises(DicomError, match="of the class 'RT Plan Storage' without a picture"):
        decoded(shipped("rtplan.dcm"))


@pytest.mark.parametrize(
    "name", ["MR_small_RLE", "MR_small_implicit", "MR_small_bigendian", "MR_small_jp2klossless"]
)
def test_the_same_image_in_another_encoding_gives_the_same_pixels(name):
    assert np.array_equal(decoded(shipped(f"{name}.dcm")), decoded(shipped("MR_small.dcm")))


class TestFrames:
    def test_frames_equal_pydicoms(self):
        path = shipped("examples_ybr_color.dcm")
        for frame in (0, 7, 29):
            assert np.array_equal(
                decoded(path, frame=frame), pydicom.pixels.pixel_array(path, index=frame)
            )
        assert np.array_equal(decoded(path, frame=-1), decoded(path, frame=29))

    def test_without_choice_the_middle_frame_is_taken_and_said_once(self, caplog):
        from moellava.images.view import say_once

        say_once.cache_clear()
        path = shipped("examples_ybr_color.dcm")
        assert np.array_equal(decoded(path), decoded(path, frame=15))
        decoded(path)
        assert caplog.text.count("the middle one is taken") == 1

    def test_a_grid_holds_the_frames_in_order(self):
        path = shipped("examples_ybr_color.dcm")
        grid = decoded(path, frame="grid:4")
        height, width = decoded(path, frame=0).shape[:2]
        assert grid.shape == (2 * height, 2 * width, 3)
        assert np.array_equal(grid[:height, :width], decoded(path, frame=0))
        assert np.array_equal(grid[height:, width:], decoded(path, frame=29))

    def test_a_frame_that_is_not_there_is_refused(self):
        with pytest.raises(DicomError, match="has no frame 30: it has 30, 0 to 29"):
            decoded(shipped("examples_ybr_color.dcm"), frame=30)

    def test_only_the_frame_asked_for_is_decoded(self, monkeypatch):
        from pydicom.pixels.decoders.base import DecodeRunner

        decodes = []
        original = DecodeRunner._decode_frame
        monkeypatch.setattr(
            DecodeRunner,
            "_decode_frame",
            lambda self, source: decodes.append(1) or original(self, source),
        )
        decoded(shipped("examples_ybr_color.dcm"), frame=12)
        assert len(decodes) == 1


def test_sixteen_bit_colours_are_scaled_by_their_bits(save_dicom):
    colours = np.random.default_rng(0).integers(0, 65536, (20, 30, 3), dtype=np.uint16)
    assert np.array_equal(decoded(save_dicom(colours)), np.rint(colours / 65535 * 255))


def test_a_dataset_bytes_and_a_path_give_the_same(save_dicom):
    path = save_dicom(ramp(), WindowCenter=40, WindowWidth=400)
    expected = np.asarray(to_pil(path))
    assert np.array_equal(np.asarray(to_pil(path.read_bytes())), expected)
    assert np.array_equal(np.asarray(to_pil(pydicom.dcmread(path))), expected)
    no_suffix = path.rename(path.with_name("IM0001"))
    assert np.array_equal(np.asarray(to_pil(no_suffix)), expected)


def test_a_huge_image_is_refused_before_it_is_decoded(save_dicom):
    path = save_dicom(np.zeros((100, 120), np.uint16))
    with pytest.raises(DicomError, match=r"is 120x100 pixels, beyond the limit of 5,000"):
        to_pil(path, max_pixels=5000)


def test_nothing_of_the_patient_is_logged_or_raised(save_dicom, caplog):
    caplog.set_level(logging.DEBUG)
    good = save_dicom(ramp())
    broken = good.with_name("broken.dcm")
    broken.write_bytes(good.read_bytes()[:-5000])
    texts = []
    decoded(good)
    for path, view in (
        (good, {"window": "lung"}),
        (good, {"frame": 3}),
        (broken, {}),
        (broken, {"frame": 9}),
    ):
        with pytest.raises(DicomError) as error:
            decoded(path, **view)
        texts.append(str(error.value).replace(str(path), ""))
    secrets = [
        str(element.value)
        for element in dicom_dataset(ramp())
        if element.VR in ("PN", "LO", "SH", "DA")
    ]
    assert len(secrets) >= 5
    for text in (*texts, caplog.text):
        assert not [secret for secret in secrets if secret and secret in text]


def test_without_pydicom_the_error_says_what_to_install(monkeypatch, save_dicom):
    import sys

    path = save_dicom(ramp())
    monkeypatch.setitem(sys.modules, "pydicom", None)
    with pytest.raises(
        ImportError, match=r"scan\.dcm is a DICOM file\. .* pip install 'moellava\[dicom\]'"
    ):
        to_pil(path)
