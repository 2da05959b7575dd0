"""Grey values of DICOM against pydicom's and highdicom's own arrays: windows and tables."""

import highdicom
import numpy as np
import pydicom
import pytest

from moellava.images.dicom_error import DicomError
from moellava.images.dicom_grey import grey_tags, lookup_table

from .conftest import CT_IMAGE, ENHANCED_CT, decoded, ramp, shipped

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning:pydicom")


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


def test_windows_of_functional_groups_equal_highdicom_frame_by_frame(save_dicom):
    """Enhanced multi-frame: rescale shared, window per frame, which pydicom does not look at."""

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
        theirs = image.get_frame(number + 1, apply_voi_transform=None, voi_output_range=(0, 255))
        assert np.abs(decoded(path, frame=number) - theirs).max() <= 0.5 + 1e-6
    assert not np.array_equal(decoded(path, frame=0), decoded(path, frame=1))


def test_a_lookup_table_holds_what_each_stored_value_is_shown_as(save_dicom):
    path = save_dicom(ramp(np.int16, -300, 300, 25), Modality="MR", WindowCenter=0, WindowWidth=400)
    tags = grey_tags(pydicom.dcmread(path), 0)
    table = lookup_table(-300, 300, np.dtype(np.int16), tags)
    stored = pydicom.dcmread(path).pixel_array
    assert np.array_equal(table[stored.view(np.uint16)], decoded(path))
    assert table.dtype == np.uint8
