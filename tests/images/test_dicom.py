"""DICOM against pydicom's and highdicom's own arrays: every file that pydicom ships, and cases built for a test."""

import logging
import warnings
from pathlib import Path

import highdicom
import numpy as np
import pydicom
import pytest
from pydicom.data import get_testdata_file, get_testdata_files

from moellava.images import View, read_image, to_pil
from moellava.images.dicom import DicomError, decode_dicom

from .conftest import CT_IMAGE, ENHANCED_CT, dicom_dataset

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
    "badVR.dcm": "broken Number of Frames, '1A'",
    "MR_truncated.dcm": "8130 vs 8192 bytes",
    "DICOMDIR": "index of a disc",
    "JPEG-lossy.dcm": r"pip install pylibjpeg pylibjpeg-libjpeg",
    "JPGExtended.dcm": r"pip install pylibjpeg pylibjpeg-libjpeg",
    "JPEG2000-embedded-sequence-delimiter.dcm": "no installed decoder",
}

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning:pydicom")


def decoded(path: Path | str, **view) -> np.ndarray:
    return decode_dicom(Path(path), View(**view), str(path))


def shipped(name: str) -> str:
    return str(get_testdata_file(name, download=False))


def expected_picture(path: Path) -> np.ndarray | None:
    """highdicom's frame, scaled by the range that is known; None where there is none or highdicom cannot read it."""
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
        # highdicom takes the window's "width - 1" in stored values where the standard takes it in rescaled ones.
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


def ramp(dtype=np.int16, low=-1024, high=3071, side=300) -> np.ndarray:
    """Every value from low to high, more pixels than a table has entries."""
    return np.resize(np.arange(low, high + 1), (side, side)).astype(dtype)


class TestWindows:
    HU = {"RescaleSlope": 1, "RescaleIntercept": -1024, "Modality": "CT", "sop_class": CT_IMAGE}

    @pytest.mark.parametrize("side", [300, 100])  # by a table, and pixel by pixel
    @pytest.mark.parametrize("kind", ["MONOCHROME1", "MONOCHROME2"])
    @pytest.mark.parametrize("function", ["LINEAR", "LINEAR_EXACT", "SIGMOID"])
    def test_windows_equal_highdicom(self, save_dicom, side, kind, function):
        path = save_dicom(
            ramp(np.uint16, 0, 4095, side),
            BitsStored=12,
            PhotometricInterpretation=kind,
            WindowCenter=40,
            WindowWidth=400,
            VOILUTFunction=function,
            **self.HU,
        )
        theirs = highdicom.imread(path).get_frame(
            1, apply_voi_transform=None, voi_output_range=(0, 255)
        )
        assert np.abs(decoded(path) - theirs).max() <= 0.5 + 1e-6
        assert len(np.unique(decoded(path))) > 150

    def test_a_preset_equals_pydicoms_window_of_its_values(self, save_dicom):
        path = save_dicom(ramp(np.int16), **self.HU | {"RescaleIntercept": 0})
        dataset = pydicom.dcmread(path)
        dataset.WindowCenter, dataset.WindowWidth = -600, 1500
        hounsfield = pydicom.pixels.apply_rescale(dataset.pixel_array, dataset)
        theirs = pydicom.pixels.apply_windowing(hounsfield, dataset)
        theirs = (theirs + 32768) / 65535 * 255
        assert np.array_equal(decoded(path, window="lung"), np.rint(theirs))
        assert np.array_equal(decoded(path, window=(-600, 1500)), np.rint(theirs))
        assert not np.array_equal(decoded(path, window="bone"), np.rint(theirs))

    def test_ct_without_a_window_is_shown_in_the_soft_tissue_window(self, caplog):
        from moellava.images.view import say_once

        say_once.cache_clear()
        path = shipped("CT_small.dcm")
        assert np.array_equal(decoded(path), decoded(path, window="soft"))
        assert "soft-tissue window" in caplog.text

    def test_a_number_chooses_among_the_files_own_windows(self):
        path = shipped("examples_overlay.dcm")
        for index in (0, 1):
            theirs = highdicom.imread(path).get_frame(
                1, apply_voi_transform=None, voi_transform_selector=index, voi_output_range=(0, 255)
            )
            assert np.abs(decoded(path, window=index) - theirs).max() <= 0.5 + 1e-6
        assert not np.array_equal(decoded(path, window=0), decoded(path, window=1))
        with pytest.raises(DicomError, match="has no window 2: it has 2 of its own"):
            decoded(path, window=2)

    def test_full_is_the_range_that_the_bits_can_hold(self, save_dicom):
        values = ramp(np.uint16, 0, 1000)
        path = save_dicom(values, BitsStored=12, WindowCenter=500, WindowWidth=100)
        assert np.array_equal(decoded(path, window="full"), np.rint(values / 4095 * 255))

    def test_without_a_window_percentiles_leave_padding_out(self, save_dicom):
        values = np.random.default_rng(0).integers(100, 1100, (64, 64)).astype(np.int16)
        values[:32] = -2000
        path = save_dicom(values, Modality="MR", PixelPaddingValue=-2000)
        low, high = np.percentile(values[32:], (0.5, 99.5))
        assert np.array_equal(
            decoded(path), np.rint(np.clip((values - low) / (high - low), 0, 1) * 255)
        )

    def test_a_ct_preset_on_another_modality_is_refused(self):
        with pytest.raises(DicomError, match="in Hounsfield units, and this is MR, not CT"):
            decoded(shipped("MR_small.dcm"), window="lung")

    def test_a_window_on_a_colour_image_is_refused_and_a_colour_files_own_is_not_used(
        self, save_dicom
    ):
        colours = np.random.default_rng(0).integers(0, 256, (20, 30, 3), dtype=np.uint8)
        path = save_dicom(colours, WindowCenter=10, WindowWidth=20)  # legal, and without meaning
        assert np.array_equal(decoded(path), colours)
        with pytest.raises(DicomError, match="in colour"):
            decoded(path, window=(40, 400))

    def test_a_negative_slope_does_not_invert(self, save_dicom):
        path = save_dicom(
            ramp(np.uint16, 0, 4095),
            BitsStored=12,
            RescaleSlope=-1,
            RescaleIntercept=0,
            WindowCenter=-2000,
            WindowWidth=1000,
            Modality="MR",
        )
        shown = decoded(path)
        assert shown[0, 0] == 255  # value 0 lies above the window
        assert shown.reshape(-1)[4095] == 0
        assert np.array_equal(decoded(path, window="full").reshape(-1)[[0, 4095]], (255, 0))

    @pytest.mark.parametrize("side", [300, 60])  # by a table, and pixel by pixel
    @pytest.mark.parametrize("dtype", [np.int16, np.uint16])
    def test_unused_bits_are_left_out_as_pydicom_does(self, save_dicom, side, dtype):
        """Files of old scanners keep overlays there."""
        values = ramp(dtype, -2048 if dtype is np.int16 else 0, 2047, side)
        elements = {"BitsStored": 12, "WindowCenter": 40, "WindowWidth": 400}
        dirty = save_dicom(
            (values & 0x0FFF) | (np.arange(side) % 16 << 12).astype(dtype), **elements
        )
        assert np.array_equal(pydicom.dcmread(dirty).pixel_array, values)
        low, high = (-2048, 2047) if dtype is np.int16 else (0, 4095)
        assert np.array_equal(
            decoded(dirty, window="full"), np.rint((values - float(low)) / (high - low) * 255)
        )


class TestTables:
    def lut(self, count, first, bits, data) -> pydicom.Dataset:
        item = pydicom.Dataset()
        item.add_new("LUTDescriptor", "US", [count, first, bits])
        item.add_new("LUTData", "US", list(map(int, data)))
        return item

    @pytest.mark.parametrize("kind", ["MONOCHROME1", "MONOCHROME2"])
    def test_a_voi_lut_equals_highdicom(self, save_dicom, kind):
        data = np.sqrt(np.arange(4096) / 4095) * 65535
        path = save_dicom(
            ramp(np.uint16, 0, 4095),
            BitsStored=12,
            PhotometricInterpretation=kind,
            VOILUTSequence=[self.lut(4096, 0, 16, data)],
        )
        theirs = highdicom.imread(path).get_frame(
            1, apply_voi_transform=None, voi_output_range=(0, 255)
        )
        assert np.abs(decoded(path) - theirs).max() <= 0.5 + 1e-6

    def test_a_voi_lut_of_eight_bits_does_not_wrap_around(self, save_dicom):
        data = np.arange(1024) // 4
        path = save_dicom(
            ramp(np.uint16, 0, 4095), BitsStored=12, VOILUTSequence=[self.lut(1024, 1000, 8, data)]
        )
        shown = decoded(path).reshape(-1)
        assert (shown[0], shown[1000], shown[1512], shown[2023], shown[4095]) == (
            0,
            0,
            128,
            255,
            255,
        )

    def test_a_modality_lut_equals_pydicom(self, save_dicom):
        data = (np.arange(4096)[::-1] // 16).astype(int)
        item = self.lut(4096, 0, 8, data)
        item.ModalityLUTType = "US"
        path = save_dicom(
            ramp(np.uint16, 0, 4095),
            BitsStored=12,
            ModalityLUTSequence=[item],
            WindowCenter=100,
            WindowWidth=120,
        )
        dataset = pydicom.dcmread(path)
        values = pydicom.pixels.apply_modality_lut(dataset.pixel_array, dataset)
        theirs = pydicom.pixels.apply_windowing(values, dataset)  # 0 to 255
        assert np.array_equal(decoded(path), np.rint(theirs))


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

    def test_a_large_file_is_read_by_the_frame(self, save_dicom, monkeypatch):
        import moellava.images.dicom as module

        frames = np.random.default_rng(0).integers(0, 4096, (5, 40, 50), dtype=np.uint16)
        path = save_dicom(frames, BitsStored=12, WindowCenter=2000, WindowWidth=3000)
        small = decoded(path, frame=3)
        monkeypatch.setattr(module, "_READ_WHOLE", 100)
        assert "PixelData" not in module._read(path)[0]
        assert np.array_equal(decoded(path, frame=3), small)
        assert np.array_equal(
            decoded(shipped("image_dfl.dcm")), pydicom.dcmread(shipped("image_dfl.dcm")).pixel_array
        )

    @pytest.mark.parametrize(
        "syntax", [pydicom.uid.ExplicitVRLittleEndian, pydicom.uid.ImplicitVRLittleEndian]
    )
    @pytest.mark.parametrize("dtype", [np.uint16, np.int16])
    def test_a_large_uncompressed_file_is_mapped_where_its_pixels_are(
        self, save_dicom, monkeypatch, syntax, dtype
    ):
        import moellava.images.dicom as module

        frames = (
            np.random.default_rng(0)
            .integers(-500, 3000, (3, 40, 50))
            .clip(np.iinfo(dtype).min)
            .astype(dtype)
        )
        path = save_dicom(frames, WindowCenter=1000, WindowWidth=3000)
        dataset = pydicom.dcmread(path)
        dataset.file_meta.TransferSyntaxUID = syntax
        dataset.private_block(0x7FE1, "moellava", create=True).add_new(1, "LO", "behind the pixels")
        dataset.save_as(path, implicit_vr=syntax.is_implicit_VR, little_endian=True)
        monkeypatch.setattr(module, "_READ_WHOLE", 0)
        expected = pydicom.dcmread(path).pixel_array
        header, pixels_at = module._read(path)
        for frame in range(3):
            assert np.array_equal(
                module._mapped_values(path, header, pixels_at, frame, path.name), expected[frame]
            )
        whole = module._stored_values(path, header, 2, path.name)
        assert np.array_equal(
            module._shown(whole, header, 2, View(), path.name), decoded(path, frame=2)
        )

    def test_a_large_file_cut_short_says_so(self, save_dicom, monkeypatch):
        path = save_dicom(ramp())
        path.write_bytes(path.read_bytes()[:-100])
        monkeypatch.setattr("moellava.images.dicom._READ_WHOLE", 0)
        with pytest.raises(DicomError, match=r"scan.dcm is cut short: .* byte [\d,]+, and it has"):
            read_image(path)

    def test_windows_of_functional_groups_equal_highdicom_frame_by_frame(self, save_dicom):
        """Enhanced multi-frame: rescale shared, window per frame; pydicom's functions look at neither."""

        def item(**elements) -> pydicom.Dataset:
            dataset = pydicom.Dataset()
            for keyword, value in elements.items():
                setattr(dataset, keyword, value)
            return dataset

        rescale = item(RescaleSlope=1, RescaleIntercept=-1024, RescaleType="HU")
        frames = np.stack([ramp(np.uint16, 0, 2000, 280) + number for number in range(3)])
        groups = [
            item(FrameVOILUTSequence=[item(WindowCenter=center, WindowWidth=width)])
            for center, width in ((40, 400), (-600, 1500), (300, 900))
        ]
        path = save_dicom(
            frames.astype(np.uint16),
            sop_class=ENHANCED_CT,
            Modality="CT",
            BitsStored=12,
            SharedFunctionalGroupsSequence=[item(PixelValueTransformationSequence=[rescale])],
            PerFrameFunctionalGroupsSequence=groups,
        )
        image = highdicom.imread(path)
        for number in range(3):
            theirs = image.get_frame(
                number + 1, apply_voi_transform=None, voi_output_range=(0, 255)
            )
            assert np.abs(decoded(path, frame=number) - theirs).max() <= 0.5 + 1e-6
        assert not np.array_equal(decoded(path, frame=0), decoded(path, frame=1))


def test_sixteen_bit_colours_are_scaled_by_their_bits(save_dicom):
    colours = np.random.default_rng(0).integers(0, 65536, (20, 30, 3), dtype=np.uint16)
    assert np.array_equal(decoded(save_dicom(colours)), np.rint(colours / 65535 * 255))


def test_a_dataset_bytes_and_a_path_give_the_same(save_dicom):
    path = save_dicom(ramp(), WindowCenter=40, WindowWidth=400)
    expected = np.asarray(read_image(path))
    assert np.array_equal(np.asarray(to_pil(path.read_bytes())), expected)
    assert np.array_equal(np.asarray(to_pil(pydicom.dcmread(path))), expected)
    no_suffix = path.rename(path.with_name("IM0001"))
    assert np.array_equal(np.asarray(read_image(no_suffix)), expected)


def test_a_huge_image_is_refused_before_it_is_decoded(save_dicom):
    path = save_dicom(np.zeros((100, 120), np.uint16))
    with pytest.raises(DicomError, match=r"is 120x100 pixels, beyond the limit of 5,000"):
        read_image(path, max_pixels=5000)


def test_the_patient_is_never_read(save_dicom):
    from moellava.images.dicom import _read

    header, _ = _read(save_dicom(ramp()))
    assert not [element for element in header if element.tag.group in (0x0010, 0x0020)]
    assert "Secret" not in str(header)


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
        read_image(path)
