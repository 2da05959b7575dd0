"""Files as a sequence of records: JSON, JSON lines, CSV, parquet, MedMNIST's `.npz`."""

import csv
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from moellava.data.json_records import JsonRecords
from moellava.storage.errors import reading
from moellava.storage.limits import require_unpackable

if TYPE_CHECKING:
    from datasets import Dataset

KINDS = (".json", ".jsonl", ".csv", ".parquet", ".npz")
_NPZ_SPLIT = re.compile(r"(\w+)_images")


class TableRecords:
    """A `datasets.Dataset` (CSV, parquet) in Arrow's cache, with its images as encoded bytes."""

    def __init__(self, dataset: "Dataset") -> None:
        from datasets import Image, List

        features = dataset.features
        self._images = [name for name, kind in features.items() if isinstance(kind, Image)]
        for name in self._images:
            dataset = dataset.cast_column(name, Image(decode=False))
        lists = [
            name
            for name, kind in features.items()
            if isinstance(kind, List) and isinstance(kind.feature, Image)
        ]
        for name in lists:
            dataset = dataset.cast_column(name, List(Image(decode=False)))
        self._lists = lists
        self.dataset = dataset
        self.columns = tuple(dataset.column_names)
        label = features.get("label")
        self.class_names: tuple[str, ...] = tuple(getattr(label, "names", None) or ())

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> object:
        return self.dataset[index]

    def scan(self) -> Iterator[object]:
        """Every record in order; an image is not read: empty bytes if it is there, else None."""
        import pyarrow as pa
        import pyarrow.compute as pc

        for table in self.dataset.with_format("arrow").iter(batch_size=1000):
            for name in self._images:
                present = pc.is_valid(pc.struct_field(table[name], "bytes"))
                with_path = pc.is_valid(pc.struct_field(table[name], "path"))
                there = pc.if_else(
                    pc.or_(present, with_path), pa.scalar(b""), pa.scalar(None, pa.binary())
                )
                table = table.set_column(table.column_names.index(name), name, there)
            for name in self._lists:
                lengths = pc.fill_null(pc.list_value_length(table[name]), 0).to_pylist()
                empty = pa.array([[b""] * length for length in lengths], pa.list_(pa.binary()))
                table = table.set_column(table.column_names.index(name), name, empty)
            yield from table.to_pylist()


class NpzRecords:
    """One split of a MedMNIST-style file.

    Its arrays are `<split>_images` (N, H, W[, 3]) uint8 and `<split>_labels` (N, L). The images of
    the split are held in memory, as the archive is compressed.
    """

    columns = ("image", "label")

    def __init__(self, path: Path, split: str) -> None:
        with np.load(path, allow_pickle=False) as arrays:
            self.images, self.labels = arrays[f"{split}_images"], arrays[f"{split}_labels"]
        if len(self.images) != len(self.labels):
            raise ValueError(
                f"{path} has {len(self.images)} images and {len(self.labels)} labels in split "
                f"{split!r}."
            )
        if self.images.ndim == 5 or (self.images.ndim == 4 and self.images.shape[-1] not in (1, 3)):
            raise ValueError(
                f"{path} holds volumes of shape {self.images.shape[1:]}; "
                "expected images (H, W) or (H, W, 3). "
                "Write slices to files of their own."
            )

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> object:
        label = np.atleast_1d(self.labels[index]).tolist()
        return {"image": self.images[index], "label": label[0] if len(label) == 1 else label}

    def scan(self) -> Iterator[object]:
        return (self[index] for index in range(len(self)))


Records = JsonRecords | TableRecords | NpzRecords


def open_records(files: Sequence[Path], split: str | None, cache_dir: str | None = None) -> Records:
    """Open one JSON, CSV or `.npz` file, or the parquet files of one split.

    Raises:
        ValueError: a kind of file that is not read; those that are read are listed.
    """
    path, kind = files[0], files[0].suffix.lower()
    if kind in (".json", ".jsonl"):
        with reading(path, "JSON"):
            return JsonRecords(path)
    if kind == ".npz":
        with reading(path, "arrays of NumPy"):
            require_unpackable(path)
            return NpzRecords(path, _npz_split(path, split))
    if kind in (".csv", ".parquet"):
        with reading(path, "a table"):
            return TableRecords(_dataset(files, kind, cache_dir))
    if kind in (".pkl", ".pickle"):
        raise ValueError(
            f"{path} is a pickle, which can run code when read. Use the set's parquet or JSON form."
        )
    raise ValueError(f"{path} is a {kind or 'nameless'} file; expected one of {', '.join(KINDS)}.")


def npz_splits(path: Path) -> list[str]:
    """The splits of a MedMNIST-style file, by its array names."""
    with np.load(path, allow_pickle=False) as arrays:
        return [match[1] for name in arrays.files if (match := _NPZ_SPLIT.fullmatch(name))]


def _npz_split(path: Path, split: str | None) -> str:
    splits = npz_splits(path)
    if not splits:
        raise ValueError(
            f"{path} has no arrays <split>_images and <split>_labels, as MedMNIST's files have."
        )
    if split is None and len(splits) == 1:
        return splits[0]
    if split not in splits:
        given = "which split?" if split is None else f"no split {split!r}."
        raise ValueError(f"{path}: {given} Give split, one of {', '.join(splits)}.")
    return split


def _dataset(files: Sequence[Path], kind: str, cache_dir: str | None) -> "Dataset":
    try:
        from datasets import Features, Value, load_dataset
    except ImportError as error:
        raise ImportError(
            f"Reading {files[0]} needs datasets. Type: pip install 'moellava[data]'"
        ) from error

    names = [str(file) for file in files]
    if kind == ".parquet":
        return load_dataset("parquet", data_files=names, split="train", cache_dir=cache_dir)
    with reading(files[0], "CSV"), files[0].open(newline="", encoding="utf-8-sig") as file:
        header = file.readline()
        delimiter = max(",;\t", key=header.count)
        columns = next(csv.reader([header], delimiter=delimiter), [])
    twice = [name for name, count in Counter(columns).items() if count > 1]
    if twice:
        raise ValueError(f"{files[0]} has two columns {twice[0]!r}. Give each its own name.")
    # All text: pandas would turn the answer "None" into a missing value and the id "007" into 7.
    features = Features({column: Value("string") for column in columns})
    return load_dataset(
        "csv",
        sep=delimiter,
        data_files=names,
        split="train",
        cache_dir=cache_dir,
        features=features,
        keep_default_na=False,
        encoding="utf-8-sig",
    )
