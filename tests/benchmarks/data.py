"""Data: DICOM against pydicom's decoding, the loader against the tower, JSON against reading it
whole.

    python -m tests.benchmarks.data [dicom loader json series]

Every number is a ratio to a rival measured in the same run, in turns with it.
"""

import argparse
import json
import logging
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import pydicom
import torch
from PIL import Image
from pydicom.data import get_testdata_file, get_testdata_files
from torch.utils.data import DataLoader

from moellava.data import read_rows
from moellava.encoders import create_encoder
from moellava.images import image_parts, load_image, to_pil
from moellava.images.series import _read_series
from moellava.testing import write_biomedclip
from moellava.testing.datasets import picture
from tests.images.memory import forget_peak, memory_mib


def in_turns(
    ours: Callable[[], object], rival: Callable[[], object], repeats: int
) -> tuple[list[float], list[float]]:
    """Milliseconds of both, taken alternately after one call each that does not count."""
    times: tuple[list[float], list[float]] = ([], [])
    ours(), rival()
    for _ in range(repeats):
        for call, kept in zip((ours, rival), times, strict=True):
            start = time.perf_counter()
            call()
            kept.append((time.perf_counter() - start) * 1e3)
    return times


def row(name: str, ours: list[float], rival: list[float]) -> None:
    def text(values: list[float]) -> str:
        return f"{statistics.median(values):.2f} ({min(values):.2f}-{max(values):.2f})"

    ratio = statistics.median(ours) / statistics.median(rival)
    print(f"| {name} | {text(ours)} | {text(rival)} | {ratio:.2f} |")


def large_file(folder: Path, side: int) -> str:
    """A radiograph's size: 12 of 16 bits, uncompressed, MONOCHROME1 with rescale and window."""
    dataset = pydicom.dcmread(get_testdata_file("CT_small.dcm", download=False))
    pixels = np.random.default_rng(0).integers(0, 4096, (side, side), dtype=np.uint16)
    dataset.Rows = dataset.Columns = side
    dataset.BitsStored, dataset.HighBit, dataset.PixelRepresentation = 12, 11, 0
    dataset.PhotometricInterpretation, dataset.WindowCenter, dataset.WindowWidth = (
        "MONOCHROME1",
        1000,
        2000,
    )
    dataset.PixelData = pixels.tobytes()
    path = folder / f"radiograph_{side}.dcm"
    dataset.save_as(path)
    return str(path)


def compressed_file(path: str) -> str:
    """The same in JPEG 2000 without loss."""
    dataset = pydicom.dcmread(path)
    dataset.compress(pydicom.uid.JPEG2000Lossless)
    target = str(Path(path).with_suffix(".j2k.dcm"))
    dataset.save_as(target)
    return target


def decode_with_pydicom(path: str) -> np.ndarray:
    return pydicom.dcmread(path).pixel_array


def dicom(folder: Path) -> None:
    print(
        "| file to 8-bit picture, ms | moellava: median (range) | pydicom's pixel_array "
        "| ratio, asked <= 1.3 |"
    )
    print("|---|---|---|---|")
    names = (
        "CT_small.dcm",
        "MR_small_RLE.dcm",
        "693_J2KI.dcm",
        "examples_rgb_color.dcm",
        "image_dfl.dcm",
    )
    files = [str(get_testdata_file(name, download=False)) for name in names]
    files += [large_file(folder, side) for side in (512, 1024, 2048)]
    for path in files:
        ours, rival = in_turns(partial(to_pil, path), partial(decode_with_pydicom, path), 30)
        row(Path(path).name, ours, rival)
    path = str(get_testdata_file("examples_ybr_color.dcm", download=False))
    ours, rival = in_turns(partial(to_pil, path, frame=7), partial(decode_with_pydicom, path), 10)
    row("one of 30 frames, examples_ybr_color.dcm, against all", ours, rival)
    every_file()


def every_file() -> None:
    """All files of one frame that pydicom ships and both can read."""
    logging.disable(logging.ERROR)  # broken files are among them
    warnings.simplefilter("ignore")
    seen: list[tuple[float, str, float, float]] = []
    for path in sorted(get_testdata_files("*.dcm")):
        try:
            if int(pydicom.dcmread(path).get("NumberOfFrames", None) or 1) > 1:
                continue
            times = in_turns(partial(to_pil, path), partial(decode_with_pydicom, path), 9)
        except Exception:  # pydicom raises what a broken file leads it to
            continue
        ours, rival = map(statistics.median, times)
        seen.append((ours / rival, Path(path).name, ours, rival))
    ratios, _, all_ours, all_rival = zip(*seen, strict=True)
    summed = sum(all_ours) / sum(all_rival)
    print(
        f"\n{len(seen)} files: median ratio {statistics.median(ratios):.2f}, "
        f"of the summed times {summed:.2f}"
    )
    print(
        "beyond 1.3: "
        + ", ".join(f"{name} {ratio:.2f}" for ratio, name, *_ in sorted(seen) if ratio > 1.3)
    )


class Pictures(torch.utils.data.Dataset):
    """The rows' images as pixel values, as a worker of the loader makes them."""

    def __init__(self, rows, processor):
        self.rows, self.processor = rows, processor

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> torch.Tensor:
        return self.processor(load_image(self.rows[index].images[0]), return_tensors="pt")[
            "pixel_values"
        ][0]


def loader(folder: Path) -> None:
    """Images/s of one worker on one core, against BiomedCLIP's ViT-B/16 on the other."""
    torch.set_num_threads(1)
    rows = []
    for number in range(64):
        if number % 2:
            picture(number, size=(800, 600)).save(folder / f"{number}.jpg", quality=90)
        else:
            Image.fromarray(np.asarray(picture(number, size=(512, 512), mode="L"))).save(
                folder / f"{number}.jpg"
            )
        turns = [{"from": "human", "value": "<image>\nWhy?"}, {"from": "gpt", "value": "No."}]
        rows.append({"id": str(number), "image": f"{number}.jpg", "conversations": turns})
    (folder / "train.json").write_text(json.dumps(rows * 4))
    tower = create_encoder("biomedclip", write_biomedclip(folder / "tower"))
    data = Pictures(read_rows(folder / "train.json", images=folder), tower.image_processor)
    batches = iter(DataLoader(data, batch_size=16, num_workers=1))
    first = next(batches)
    start = time.perf_counter()
    count = sum(len(batch) for batch in batches)
    loaded = count / (time.perf_counter() - start)
    encoded = []
    with torch.inference_mode():
        for _ in range(3):
            start = time.perf_counter()
            tower(first)
            encoded.append(len(first) / (time.perf_counter() - start))
    rate = statistics.median(encoded)
    print(
        f"loader, 1 worker: {loaded:.1f} images/s; tower, 1 thread: {rate:.2f}; "
        f"ratio {loaded / rate:.1f}, asked 1.5"
    )


def series(folder: Path) -> None:
    """8 slices of a CT of 600 x 512 x 512, against the least that a series costs: its headers."""
    rng = np.random.default_rng(0)
    dataset = pydicom.dcmread(get_testdata_file("CT_small.dcm", download=False))
    dataset.Rows = dataset.Columns = 512
    dataset.ImageOrientationPatient = [1, 0, 0, 0, 1, 0]
    (folder / "ct").mkdir()
    for place in range(600):
        dataset.ImagePositionPatient = [0, 0, place * 0.625]
        dataset.PixelData = rng.integers(0, 3000, (512, 512), dtype=np.int16).tobytes()
        dataset.save_as(folder / "ct" / f"{place * 7 % 601:03d}.dcm")
    paths = sorted((folder / "ct").iterdir())
    chosen = [f"{(2 * place + 1) * 600 // 16 * 7 % 601:03d}.dcm" for place in range(8)]

    def ours() -> None:
        _read_series.cache_clear()
        for part in image_parts(folder / "ct", slices=8, window="lung"):
            to_pil(part)

    def least() -> None:
        for path in paths:
            pydicom.dcmread(
                path, stop_before_pixels=True, specific_tags=["ImagePositionPatient", "PatientID"]
            )
        for name in chosen:
            decode_with_pydicom(str(folder / "ct" / name))

    def all_slices() -> None:
        for path in paths:
            decode_with_pydicom(str(path))

    print("| 8 of 600 slices, ms | moellava: median (range) | rival | ratio |\n|---|---|---|---|")
    row("against all headers and 8 slices, by pydicom", *in_turns(ours, least, 5))
    forget_peak()
    before, read = memory_mib("VmRSS"), bytes_read()
    ours()
    read = (bytes_read() - read) / 2**20
    print(f"read: {read:.1f} MiB of {600 * len(dataset.PixelData) / 2**20:.0f} MiB of pixels; ")
    print(f"peak memory above the start: {memory_mib('VmHWM') - before} MiB")
    row("against all 600 slices, by pydicom", *in_turns(ours, all_slices, 2))


def bytes_read() -> int:
    """Of files, by this process, from the disk or its cache."""
    return int(Path("/proc/self/io").read_text().partition("rchar: ")[2].split()[0])


def json_rows(folder: Path) -> None:
    turns = [
        {"from": "human", "value": "<image>\n" + "word " * 60},
        {"from": "gpt", "value": "word " * 20},
    ]
    rows = [{"id": f"r{n}", "image": f"{n}.jpg", "conversations": turns} for n in range(100_000)]
    path = folder / "big.json"
    path.write_text(json.dumps(rows))
    ours, rival = in_turns(lambda: read_rows(path), lambda: json.loads(path.read_text()), 3)
    print(
        f"\n100,000 rows, {path.stat().st_size / 1e6:.0f} MB: every row checked, "
        "against json.loads of the whole (ms)"
    )
    row("read_rows", ours, rival)


if __name__ == "__main__":
    parts = {"dicom": dicom, "loader": loader, "json": json_rows, "series": series}
    parser = argparse.ArgumentParser()
    parser.add_argument("parts", nargs="*", default=list(parts))
    for part in parser.parse_args().parts:
        with tempfile.TemporaryDirectory() as folder:
            parts[part](Path(folder))
