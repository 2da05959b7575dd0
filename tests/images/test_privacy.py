"""Nothing that a file says of a patient is said by us, however the file is broken.

Nor by the libraries that read it for us: in errors, warnings, logs, or on stdout and stderr.
"""

import io
import logging
import struct
import traceback
import warnings

import nibabel
import numpy as np
import pydicom
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from PIL import Image, PngImagePlugin, TiffImagePlugin
from pydicom.data import get_testdata_file

from moellava.images import load_image
from moellava.images.folder import find_images

from .conftest import dicom_dataset, ramp

NAME, ID = "ZZMARKEDZZ^NAME", "IDMARKED4711"
VRS = sorted(vr.value for vr in pydicom.valuerep.VR if len(vr.value) == 2)
FUZZ = settings(
    max_examples=500,
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=list(HealthCheck),
)


def marked_dataset(**elements) -> pydicom.Dataset:
    """Names and numbers before, among and behind the elements of the picture."""
    dataset = dicom_dataset(ramp(side=20), WindowCenter=40, WindowWidth=400, **elements)
    dataset.PatientName, dataset.PatientID, dataset.StationName = NAME, ID, ID
    dataset.PatientComments = dataset.ImageComments = dataset.LossyImageCompressionMethod = ID
    dataset.RescaleType, dataset.WindowCenterWidthExplanation = ID, ID
    inner = pydicom.Dataset()
    inner.PatientName, inner.LUTExplanation = NAME, ID
    dataset.RequestAttributesSequence = [inner]
    dataset.private_block(0x0029, ID, create=True).add_new(1, "LO", NAME)
    return dataset


def as_bytes(dataset: pydicom.Dataset) -> bytes:
    buffer = io.BytesIO()
    dataset.save_as(buffer, enforce_file_format=True)
    return buffer.getvalue()


def marked_compressed() -> bytes:
    dataset = pydicom.dcmread(get_testdata_file("MR_small_jp2klossless.dcm", download=False))
    for element in marked_dataset():
        if element.tag.group in (0x0008, 0x0010, 0x0029):
            dataset[element.tag] = element
    return as_bytes(dataset)


FILES = {"plain": as_bytes(marked_dataset()), "compressed": marked_compressed()}


def heads(data: bytes) -> list[int]:
    """Where the elements begin, those in sequences too; of explicit VR, little endian."""
    dataset = pydicom.dcmread(io.BytesIO(data))
    tags = [element.tag for element in (*dataset.file_meta, *dataset.iterall())]
    found = [data.find(struct.pack("<HH", tag.group, tag.element), 132) for tag in tags]
    return sorted({place for place in found if place > 0})


HEADS = {name: heads(data) for name, data in FILES.items()}
LENGTHS = (0, 1, 2, 3, 7, 8, 10, 16, 18, 40, 64, 200, 0x7FFF, 0xFFFE, 0xFFFF)


def shown_texts(error: BaseException | None) -> list[str]:
    """The texts of an error and of those before it that a traceback shows."""
    if error is None:
        return []
    before = error.__cause__ or (None if error.__suppress_context__ else error.__context__)
    return [*traceback.format_exception_only(error), *shown_texts(before)]


def said(read, caplog, capfd) -> str:
    """All that becomes visible while `read` runs, texts of errors included."""
    caplog.clear()
    caplog.set_level(logging.DEBUG)
    capfd.readouterr()
    text = ""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            read()
        except ValueError as error:
            text = "\n".join(shown_texts(error))
    shown = "".join(capfd.readouterr())
    return f"{text} {caplog.text} {shown} {[str(warning.message) for warning in caught]}"


class TestDicom:
    @FUZZ
    @given(
        kind=st.sampled_from(sorted(FILES)),
        edits=st.lists(
            st.tuples(
                st.integers(0, 10**6),
                st.sampled_from(LENGTHS) | st.sampled_from(VRS),
                st.booleans(),
            ),
            min_size=1,
            max_size=3,
        ),
    )
    def test_wrong_lengths_and_kinds_say_no_value(self, caplog, capfd, kind, edits):
        """A wrong length makes one element swallow others, whose values pydicom would quote."""
        data = bytearray(FILES[kind])
        for number, change, is_long in edits:
            place = HEADS[kind][number % len(HEADS[kind])]
            if isinstance(change, str):
                data[place + 4 : place + 6] = change.encode()
            elif is_long:
                data[place + 8 : place + 12] = struct.pack("<I", change)
            else:
                data[place + 6 : place + 8] = struct.pack("<H", change)
        assert "MARKED" not in said(lambda: load_image(bytes(data)), caplog, capfd)

    @FUZZ
    @given(place=st.integers(132, 3000), value=st.integers(0, 255))
    def test_a_wrong_byte_says_no_value(self, caplog, capfd, place, value):
        data = bytearray(FILES["plain"])
        data[place % len(data)] = value
        assert "MARKED" not in said(lambda: load_image(bytes(data)), caplog, capfd)

    @pytest.mark.parametrize(
        "keyword",
        [
            *("Modality", "PhotometricInterpretation", "NumberOfFrames", "SOPClassUID", "Rows"),
            *("BitsAllocated", "BitsStored", "SamplesPerPixel", "PixelRepresentation", "HighBit"),
            *("RescaleSlope", "WindowCenter", "WindowWidth", "VOILUTFunction", "PixelData"),
            *("PixelPaddingValue", "PlanarConfiguration", "PresentationLUTShape"),
        ],
    )
    @pytest.mark.parametrize("window", [None, "lung", 0, "full"])
    def test_elements_of_the_picture_are_not_quoted(self, caplog, capfd, keyword, window):
        dataset = marked_dataset()
        vr = pydicom.datadict.dictionary_VR(keyword)
        if keyword == "SOPClassUID":
            del dataset.Rows
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            dataset["PixelData"].VR = "OW"  # or pydicom would ask the element for it
            dataset.add_new(keyword, "LO", NAME)
            buffer = io.BytesIO()
            dataset.save_as(buffer, enforce_file_format=False)
        head = struct.pack("<HH", *divmod(int(pydicom.tag.Tag(keyword)), 1 << 16)) + b"LO"
        for kind in ("LO", vr[:2]):  # as it was written, and under the name of its own kind
            data = buffer.getvalue().replace(head, head[:4] + kind.encode())
            read = lambda data=data: load_image(data, window=window)  # noqa: E731
            assert "MARKED" not in said(read, caplog, capfd)

    def test_looking_through_a_folder_says_nothing(self, tmp_path, caplog, capfd):
        data = bytearray(FILES["plain"])
        for number, place in enumerate(HEADS["plain"]):
            broken = data.copy()
            broken[place + 6 : place + 8] = b"\xfe\xff"
            (tmp_path / f"{number}.dcm").write_bytes(broken)
        assert "MARKED" not in said(lambda: find_images(tmp_path), caplog, capfd)


def nifti_bytes() -> bytes:
    image = nibabel.Nifti1Image(np.arange(720, dtype=np.int16).reshape(8, 9, 10), np.eye(4))
    for field in ("descrip", "aux_file", "intent_name", "db_name", "data_type"):
        image.header[field] = ID[: image.header[field].dtype.itemsize or 10].encode()
    image.header.extensions.append(nibabel.nifti1.Nifti1Extension("comment", NAME.encode()))
    return image.to_bytes()


def picture_bytes(kind: str) -> bytes:
    """A picture with texts in all places that its format has for them."""
    exif = Image.Exif()
    exif[0x010E], exif[0x013B], exif[0x0112] = NAME, ID, 6
    options: dict[str, object] = {"exif": exif}
    if kind == "PNG":
        options["pnginfo"] = texts = PngImagePlugin.PngInfo()
        texts.add_text("Patient", NAME)
        texts.add_text("ID", ID, zip=True)
        texts.add_itxt("Comment", ID)
    elif kind == "TIFF":
        options = {"tiffinfo": TiffImagePlugin.ImageFileDirectory_v2()}
        for tag in (270, 271, 272, 305, 315, 316, 33432, 65000):
            options["tiffinfo"][tag] = NAME
    elif kind in ("JPEG", "GIF"):
        options["comment"] = NAME.encode()
    buffer = io.BytesIO()
    pixels = np.random.default_rng(0).integers(0, 255, (6, 8, 3), np.uint8)
    Image.fromarray(pixels).save(buffer, kind, **options)
    return buffer.getvalue()


OTHERS = {
    "nifti": nifti_bytes(),
    **{kind: picture_bytes(kind) for kind in ("PNG", "TIFF", "JPEG", "WEBP", "GIF")},
}


@pytest.mark.parametrize("kind", OTHERS)
@FUZZ
@given(edits=st.lists(st.tuples(st.integers(0, 700), st.integers(0, 255)), min_size=1, max_size=4))
@example(edits=[(0, 0)])
def test_texts_of_other_files_are_not_said(caplog, capfd, kind, edits):
    data = bytearray(OTHERS[kind])
    assert b"MARKED" in data
    for place, value in edits:
        data[place % len(data)] = value
    assert "MARKED" not in said(lambda: load_image(bytes(data)), caplog, capfd)


def test_a_tag_of_a_tiff_that_takes_another_ones_place_is_not_quoted(caplog, capfd):
    """Each text of a TIFF under the number of each tag that Pillow looks at."""
    data = OTHERS["TIFF"]
    for own in (270, 65000):
        place = data.index(struct.pack("<HH", own, 2))
        for number in (*range(254, 350), 34377, 34675, 34853, 37724, 50838, 50839):
            broken = data[:place] + struct.pack("<H", number) + data[place + 2 :]
            assert "MARKED" not in said(lambda data=broken: load_image(data), caplog, capfd)
