"""Small files that ask for much memory: each is read, and the most that it took is printed.

    python tests/images/bombs.py

`above` is the peak of the process above what it held when all was imported, by Linux's own count.
"""

import argparse
import gzip
import io
import json
import struct
import tempfile
import time
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path

import nibabel
import numpy as np
import pydicom
from memory import forget_peak, memory_mib
from PIL import Image
from pydicom.encaps import encapsulate

MIB = 1 << 20
CT = "1.2.840.10008.5.1.4.1.1.2"
# Pillow's own limit of pixels allows these: 13,377 x 13,377.
SIDE = 13_377


def png(path: Path, width: int, height: int, *, bits: int, colour: int, channels: int = 1) -> None:
    """A black picture, written row by row."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        crc = struct.pack(">I", zlib.crc32(kind + data))
        return struct.pack(">I", len(data)) + kind + data + crc

    pack = zlib.compressobj(1)
    row = bytes(1 + (width * bits * channels + 7) // 8)
    body = b"".join(pack.compress(row) for _ in range(height)) + pack.flush()
    header = struct.pack(">2I5B", width, height, bits, colour, 0, 0, 0)
    path.write_bytes(
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", body) + chunk(b"IEND", b"")
    )


def dicom(side: int, *, samples: int, bits: int, syntax: str, **elements: object) -> bytes:
    """The elements of a picture up to its pixels, as bytes."""
    dataset = pydicom.Dataset()
    dataset.file_meta = pydicom.dataset.FileMetaDataset()
    dataset.file_meta.TransferSyntaxUID = syntax
    dataset.file_meta.MediaStorageSOPClassUID = dataset.SOPClassUID = CT
    dataset.file_meta.MediaStorageSOPInstanceUID = dataset.SOPInstanceUID = "1.2.3"
    dataset.Rows = dataset.Columns = side
    dataset.SamplesPerPixel, dataset.PixelRepresentation = samples, 0
    dataset.PhotometricInterpretation = "RGB" if samples == 3 else "MONOCHROME2"
    if samples == 3:
        dataset.PlanarConfiguration = 0
    dataset.BitsAllocated = dataset.BitsStored = bits
    dataset.HighBit = bits - 1
    for keyword, value in elements.items():
        setattr(dataset, keyword, value)
    file = io.BytesIO()
    dataset.save_as(file, enforce_file_format=True)
    return file.getvalue()


def deflated(path: Path, num_bytes: int) -> None:
    """Rows and columns of 16 bits, and as many zeros as pixels as are asked for."""
    plain = dicom(1024, samples=1, bits=16, syntax=pydicom.uid.ExplicitVRLittleEndian)
    start = 144 + int.from_bytes(plain[140:144], "little")
    meta = plain[:start].replace(b"1.2.840.10008.1.2.1\0", b"1.2.840.10008.1.2.1.99")
    grown = int.from_bytes(meta[140:144], "little") + len(meta) - start
    length = plain.index(b"UI", plain.index(b"\x02\0\x10\0")) + 2  # of the transfer syntax
    meta = meta[:140] + struct.pack("<I", grown) + meta[144:length] + b"\x16\0" + meta[length + 2 :]
    pack = zlib.compressobj(1, wbits=-15)
    head = b"\xe0\x7f\x10\0OW\0\0" + struct.pack("<I", num_bytes)
    with path.open("wb") as file:
        file.write(meta + pack.compress(plain[start:] + head))
        for _ in range(num_bytes // MIB):
            file.write(pack.compress(bytes(MIB)))
        file.write(pack.flush())


def jpeg_dicom(path: Path, side: int, says: int, *, samples: int, kind: str = "JPEG") -> None:
    """A JPEG of `side` pixels in a file whose header says `says`."""
    file = io.BytesIO()
    Image.new("RGB" if samples == 3 else "L", (side, side)).save(file, kind, quality=50)
    syntax = pydicom.uid.JPEGBaseline8Bit if kind == "JPEG" else pydicom.uid.JPEG2000
    elements = {"PhotometricInterpretation": "YBR_FULL"} if samples == 3 else {}
    path.write_bytes(
        dicom(
            says,
            samples=samples,
            bits=8,
            syntax=syntax,
            PixelData=encapsulate([file.getvalue()]),
            **elements,
        )
    )


def run_length_dicom(path: Path, side: int, *, bits: int) -> None:
    """A frame of no data that announces one segment for each byte of a pixel."""
    count = bits // 8
    segments = struct.pack("<16I", count, *[64] * count, *[0] * (15 - count)) + b"\x80\0"
    path.write_bytes(
        dicom(
            side,
            samples=1,
            bits=bits,
            syntax=pydicom.uid.RLELossless,
            PixelData=encapsulate([segments]),
        )
    )


def nifti(path: Path, shape: tuple[int, ...], dtype: type, zooms: tuple[float, ...]) -> None:
    """A volume of zeros, gzipped piece by piece."""
    header = nibabel.Nifti1Header()
    header.set_data_dtype(dtype)
    header.set_data_shape(shape)
    header.set_sform(np.diag([*zooms, 1]), 1)
    header["vox_offset"], header["magic"] = 352, b"n+1"
    with gzip.open(path, "wb", compresslevel=1) as file:
        file.write(header.binaryblock + bytes(4))
        left = int(np.prod(shape, dtype=np.int64)) * np.dtype(dtype).itemsize
        while left > 0:
            file.write(bytes(min(left, MIB)))
            left -= MIB


def frames(path: Path, side: int, count: int, kind: str) -> None:
    pictures = [Image.new("RGB", (side, side), (number, 0, 0)) for number in range(count)]
    options = {"compression": "tiff_deflate"} if kind == "TIFF" else {}
    pictures[0].save(path, kind, save_all=True, append_images=pictures[1:], **options)


def arrays(path: Path) -> None:
    zeros = np.zeros((20_000, 128, 128), np.uint8)
    np.savez_compressed(path, train_images=zeros, train_labels=np.zeros((20_000, 1), np.uint8))


# Name and view → what writes the file.
BOMBS: dict[str, tuple[dict[str, object], Callable[[Path], None]]] = {
    "1x1000000.png": ({}, lambda path: png(path, 1, 1_000_000, bits=1, colour=0)),
    "thin.png": ({}, lambda path: png(path, 1000, 1, bits=8, colour=0)),
    "grey16.png": ({}, lambda path: png(path, SIDE, SIDE, bits=16, colour=0)),
    "grey16_window.png": (
        {"window": (2000, 4000)},
        lambda path: png(path, SIDE, SIDE, bits=16, colour=0),
    ),
    "rgb.png": ({}, lambda path: png(path, SIDE, SIDE, bits=8, colour=2, channels=3)),
    "rgba.png": ({}, lambda path: png(path, SIDE, SIDE, bits=8, colour=6, channels=4)),
    "60000x60000.png": ({}, lambda path: png(path, 60_000, 60_000, bits=1, colour=0)),
    "deflated_1500.dcm": ({}, lambda path: deflated(path, 1500 * MIB)),
    "deflated_600.dcm": ({}, lambda path: deflated(path, 600 * MIB)),
    "deflated_500.dcm": ({}, lambda path: deflated(path, 500 * MIB)),
    "jpeg.dcm": ({}, lambda path: jpeg_dicom(path, 9000, 9000, samples=3)),
    "jpeg_in_small.dcm": ({}, lambda path: jpeg_dicom(path, 13_000, 64, samples=1)),
    "jpeg2000.dcm": ({}, lambda path: jpeg_dicom(path, 9000, 9000, samples=3, kind="JPEG2000")),
    "run_length.dcm": ({}, lambda path: run_length_dicom(path, SIDE, bits=64)),
    "run_length_16.dcm": ({}, lambda path: run_length_dicom(path, 11_500, bits=16)),
    "voxels.nii.gz": (
        {"plane": "coronal"},
        lambda path: nifti(path, (64, 64, 64), np.uint8, (1, 1, 1e6)),
    ),
    "float.nii.gz": ({}, lambda path: nifti(path, (9000, 9000, 3), np.float64, (1, 1, 1))),
    "sagittal.nii.gz": (
        {"plane": "sagittal"},
        lambda path: nifti(path, (200, 4000, 4000), np.uint8, (1, 1, 1)),
    ),
    "short.nii.gz": ({}, lambda path: nifti(path, (5700, 5700, 3), np.int16, (1, 1, 1))),
    "grid.tif": ({"frame": "grid"}, lambda path: frames(path, 3300, 16, "TIFF")),
    "grid.gif": ({"frame": "grid"}, lambda path: frames(path, 3300, 16, "GIF")),
    "grid_of_millions.tif": ({"frame": "grid:100000000"}, lambda path: frames(path, 8, 3, "TIFF")),
    "arrays.npz": ({}, arrays),
}


def read(path: Path, view: dict[str, object], as_bytes: bool) -> str:
    """What comes of it, in a line."""
    from moellava.data import read_rows
    from moellava.images import load_image

    try:
        if path.suffix == ".npz":
            read_rows(path, split="train", class_names=["a", "b"])
            return "read"
        picture = load_image(path.read_bytes() if as_bytes else path, **view)
        return f"read, {picture.width}x{picture.height}"
    except (ValueError, OSError, ImportError, TypeError) as error:
        return f"{type(error).__name__}: {str(error).replace(str(path.parent), '')[:150]}"


def results(names: list[str], folder: Path) -> Iterator[dict[str, object]]:
    imported = memory_mib("VmRSS")
    for name in names:
        view, write = BOMBS[name]
        write(folder / name)
        for as_bytes in (False, True) if not name.endswith(".npz") else (False,):
            forget_peak()
            started = time.monotonic()
            end = read(folder / name, view, as_bytes)
            yield {
                "name": name,
                "as": "bytes" if as_bytes else "path",
                "file_kib": (folder / name).stat().st_size >> 10,
                "end": end,
                "above_mib": memory_mib("VmHWM") - imported,
                "seconds": round(time.monotonic() - started, 1),
            }
        (folder / name).unlink()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("names", nargs="*", default=list(BOMBS))
    asked = parser.parse_args()

    import moellava.data
    import moellava.images

    read_small(moellava.images.load_image)
    with tempfile.TemporaryDirectory() as folder:
        for result in results(asked.names, Path(folder)):
            print(json.dumps(result), flush=True)


def read_small(load_image: Callable[[str], Image.Image]) -> None:
    """Import what decoders need."""
    from pydicom.data import get_testdata_file

    for name in ("CT_small.dcm", "SC_rgb_rle.dcm", "MR_small_jp2klossless.dcm"):
        load_image(str(get_testdata_file(name, download=False)))


if __name__ == "__main__":
    main()
