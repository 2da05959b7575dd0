"""A DICOM file, its bytes or a dataset → the elements of its picture and its stored values.

Only the elements named here are kept when a file is read: those of the patient and the study are
never looked at.
"""

import functools
import io
import zlib
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

import numpy as np

from moellava.images.dicom_decoders import codestream_size, decoded_by, safe_plugins
from moellava.images.dicom_error import DicomError
from moellava.images.dicom_grey import GREY_ELEMENTS
from moellava.images.image_like import DicomDataset
from moellava.images.optional import load_optional
from moellava.storage.limits import require_within

_COLOURS = ("Red", "Green", "Blue")
# Fewer names also mean less time: pydicom converts each of them per file.
_KEPT = (
    "SOPClassUID",
    "NumberOfFrames",
    "ExtendedOffsetTable",
    "ExtendedOffsetTableLengths",
    "SharedFunctionalGroupsSequence",
    "PerFrameFunctionalGroupsSequence",
    "Rows",
    "Columns",
    "SamplesPerPixel",
    "PhotometricInterpretation",
    "PlanarConfiguration",
    "PixelPresentation",
    "BitsAllocated",
    "HighBit",
    *GREY_ELEMENTS,
    *(f"{colour}PaletteColorLookupTableDescriptor" for colour in _COLOURS),
    *(f"{colour}PaletteColorLookupTableData" for colour in _COLOURS),
    *(f"Segmented{colour}PaletteColorLookupTableData" for colour in _COLOURS),
)
_PIXELS = (0x7FE00010, 0x7FE00009, 0x7FE00008)
_EXPLICIT_HEAD = 12  # bytes before the pixels: tag, kind, length (PS3.5, 7.1.2)
READ_WHOLE = 1 << 20  # bytes; of larger files, pixels are mapped or read frame by frame
GREY = ("MONOCHROME1", "MONOCHROME2")


@dataclass(frozen=True)
class DicomFile:
    """One file, and how its pixels are reached.

    Args:
        source: the file, its bytes, or a dataset.
        header: the elements of the picture; of a small file, with the pixels.
        pixels_at: the byte at which the pixels of a large file begin; None if they are in `header`.
        name: for messages.
    """

    source: Path | bytes | DicomDataset
    header: DicomDataset
    pixels_at: int | None
    name: str

    @property
    def num_frames(self) -> int:
        return int(self.header.get("NumberOfFrames", None) or 1)

    def values(self, frame: int) -> np.ndarray:
        """(H, W), or (H, W, 3) with colours converted to RGB, of one frame.

        Other frames are not decoded. Grey values of 16 allocated bits still have what stands in
        their unused bits.
        """
        mapped = self.mapped_values(frame)
        return self.decoded_values(frame) if mapped is None else mapped

    def mapped_values(self, frame: int) -> np.ndarray | None:
        """(H, W) of a large, uncompressed grey file of 16 allocated bits; None of any other."""
        header, uid = self.header, pydicom_module().uid
        # Bytes before the pixels (PS3.5, 7.1).
        heads = {uid.ExplicitVRLittleEndian: _EXPLICIT_HEAD, uid.ImplicitVRLittleEndian: 8}
        head_bytes = heads.get(header.file_meta.TransferSyntaxUID)
        is_plain = self._is_grey_of_16_bits() and header.get("SamplesPerPixel") == 1
        if not isinstance(self.source, Path) or self.pixels_at is None:
            return None
        if head_bytes is None or not is_plain:
            return None
        with self.source.open("rb") as file:
            file.seek(self.pixels_at)
            head = file.read(head_bytes)
        rows, columns = int(header.Rows), int(header.Columns)
        start = self.pixels_at + len(head)
        begin = start + frame * rows * columns * 2
        there = start + int.from_bytes(head[-4:], "little")
        if head[:4] != b"\xe0\x7f\x10\x00" or begin + rows * columns * 2 > there:
            return None  # float or broken: pydicom says what is wrong
        if there > (size := self.source.stat().st_size):
            raise DicomError(
                f"{self.name} is cut short: its pixels should end at byte {there:,}, "
                f"and it has {size:,}."
            )
        kind = "<i2" if header.get("PixelRepresentation") else "<u2"
        return np.asarray(np.memmap(self.source, kind, "r", begin, (rows, columns)))

    def decoded_values(self, frame: int) -> np.ndarray:
        """The same through pydicom's decoders, of any file."""
        pixel_array = pydicom_module().pixels.pixel_array
        source, options = self._pixels()
        syntax = str(self.header.file_meta.TransferSyntaxUID)
        plugins = safe_plugins(syntax)
        if plugins not in ([], [""]):
            self._refuse_larger_codestream(source, frame)
        # pydicom would copy all pixels and shift them to and fro; the table of what is shown does
        # that per value.
        options["correct_unused_bits"] = not self._is_grey_of_16_bits()

        def decode(plugin: str) -> np.ndarray:
            values: np.ndarray = pixel_array(source, index=frame, decoding_plugin=plugin, **options)
            return values

        try:
            return decoded_by(plugins, decode, syntax, self.name)
        except AttributeError as error:
            if "pixel data" in str(error).lower():
                raise DicomError(f"{self.name} is a DICOM file without pixel data.") from None
            raise

    def _pixels(self) -> tuple[Path | DicomDataset, dict[str, object]]:
        """Where pydicom finds the pixels, and the options that go with it."""
        header = self.header
        if isinstance(self.source, Path) and self.pixels_at is not None:
            return self.source, {"transfer_syntax_uid": header.file_meta.TransferSyntaxUID}
        return header, {"view_only": True}  # not copied; nothing here writes into it

    def _refuse_larger_codestream(self, source: Path | DicomDataset, frame: int) -> None:
        """Decoders allocate what a frame itself asks for, which the header has not bounded."""
        header = self.header
        try:
            size = codestream_size(self._encoded_frame(source, frame))
        except Exception:  # whatever broken fragments lead pydicom to; it says so when it decodes
            return
        if size is not None and size[0] * size[1] > int(header.Columns) * int(header.Rows):
            raise DicomError(
                f"{self.name} is broken: a frame in it is {size[0]}x{size[1]} pixels, its header "
                f"says {int(header.Columns)}x{int(header.Rows)}."
            )

    def _encoded_frame(self, source: Path | DicomDataset, frame: int) -> bytes:
        header, encaps = self.header, pydicom_module().encaps
        offsets = [header.get(f"ExtendedOffsetTable{part}") for part in ("", "Lengths")]
        options = {
            "number_of_frames": self.num_frames,
            "extended_offsets": tuple(offsets) if all(offsets) else None,
        }
        if not isinstance(source, Path):
            pixels = source.get("PixelData")
            return bytes(encaps.get_frame(pixels, frame, **options)) if pixels else b""
        with source.open("rb") as file:
            file.seek((self.pixels_at or 0) + _EXPLICIT_HEAD)
            return bytes(encaps.get_frame(file, frame, **options))

    def _is_grey_of_16_bits(self) -> bool:
        kind, bits = (
            self.header.get(name) for name in ("PhotometricInterpretation", "BitsAllocated")
        )
        return kind in GREY and bits == 16


def read_dicom(source: Path | bytes | DicomDataset, name: str) -> DicomFile:
    """The elements of a picture with its pixels; of a large file, those before the pixels.

    Raises:
        ImportError: pydicom is not installed.
        DicomError: there is no picture in it.
    """
    pydicom = pydicom_module(name)
    pixels_at = None
    header: DicomDataset
    if not isinstance(source, Path | bytes):
        header = source
    elif (
        _is_bounded_deflated(source, name)
        or isinstance(source, bytes)
        or source.stat().st_size <= READ_WHOLE
    ):
        file = io.BytesIO(source) if isinstance(source, bytes) else source
        header = pydicom.dcmread(file, specific_tags=[*_kept_tags(), *_PIXELS], force=True)
    else:
        with source.open("rb") as opened:
            header = pydicom.dcmread(
                opened, stop_before_pixels=True, specific_tags=[*_kept_tags()], force=True
            )
            pixels_at = opened.tell()
    _complete_meta(header)
    _refuse_without_picture(header, name)
    return DicomFile(source, header, pixels_at, name)


def pydicom_module(name: str = "This") -> ModuleType:
    return load_optional("pydicom", f"{name} is a DICOM file", extra="dicom")


def _is_bounded_deflated(source: Path | bytes, name: str) -> bool:
    """Whether a file is deflated; pydicom inflates it whole, so that its size is counted first.

    Raises:
        ValueError: it is, beyond the limit.
    """
    reader, uid = pydicom_module().filereader, pydicom_module().uid
    with io.BytesIO(source) if isinstance(source, bytes) else source.open("rb") as file:
        reader.read_preamble(file, force=True)
        # pydicom's public functions do not say where the elements begin.
        meta = reader._read_file_meta_info(file)
        if meta.get("TransferSyntaxUID") != uid.DeflatedExplicitVRLittleEndian:
            return False
        inflate, total = zlib.decompressobj(wbits=-15), 0
        try:
            while chunk := inflate.unconsumed_tail or file.read(1 << 16):
                total += len(inflate.decompress(chunk, 1 << 20))
                require_within("unpacked", total, name)
                if inflate.eof:
                    break
        except zlib.error:
            pass  # broken: pydicom gets no further, and says so
    return True


@functools.cache
def _kept_tags() -> tuple[int, ...]:
    return tuple(map(pydicom_module().tag.Tag, _KEPT))


def _complete_meta(header: DicomDataset) -> None:
    """Give a file without a header of the file format the transfer syntax that pydicom guessed."""
    pydicom = pydicom_module()
    meta, uid = getattr(header, "file_meta", None), pydicom.uid
    if meta is not None and "TransferSyntaxUID" in meta:
        return
    header.file_meta = meta = meta if meta is not None else pydicom.dataset.FileMetaDataset()
    is_implicit, is_little = header.original_encoding
    explicit = uid.ExplicitVRLittleEndian if is_little else uid.ExplicitVRBigEndian
    meta.TransferSyntaxUID = uid.ImplicitVRLittleEndian if is_implicit else explicit


def _refuse_without_picture(header: DicomDataset, name: str) -> None:
    if header.get("Rows") is None or header.get("Columns") is None:
        uid = pydicom_module().uid
        kind = uid.UID(
            str(
                header.get("SOPClassUID", "") or header.file_meta.get("MediaStorageSOPClassUID", "")
            )
        )
        if kind == uid.MediaStorageDirectoryStorage:
            raise DicomError(
                f"{name} is a DICOMDIR, the index of a disc. "
                "Give one of the image files that it lists."
            )
        known = _uid_name(kind)
        what = f" of the class {known!r}" if known else ""
        raise DicomError(
            f"{name} is a DICOM file{what} without a picture: it has no rows and columns."
        )
    frames = header.get("NumberOfFrames", None)
    if frames is not None and not str(frames or "1").isdigit():
        raise DicomError(f"{name} has a broken Number of Frames; expected a whole number.")


def _uid_name(uid: object) -> str:
    """The name of a UID of the standard; empty for any other, which may be an identifier."""
    names = pydicom_module().uid.UID_dictionary
    return str(names[str(uid)][0]) if str(uid) in names else ""
