"""Where a dataset lies, here or on the hub: the files of one split, the folder of its images."""

import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

from moellava.data.archives import unpacked
from moellava.data.formats import Format
from moellava.data.records import KINDS
from moellava.messages import unknown_name

_FIRST = 64  # images that are looked for to find their folder
_REPO_ID = re.compile(r"[\w.-]+/[\w.-]+")


@dataclass(frozen=True, kw_only=True)
class HubDataset:
    """A dataset of the hub, and how it is fetched."""

    repo_id: str
    revision: str | None = None
    cache_dir: str | Path | None = None
    local_files_only: bool = False


@dataclass(frozen=True, kw_only=True)
class Location:
    """The files of one split.

    Args:
        name: the file, folder or id, as the user gave it.
        split: as the file's name says it, None if it says nothing.
        split_in_rows: whether the split must be looked for in the rows themselves.
        hub: of a hub id, for archives of images.
    """

    name: str
    files: tuple[Path, ...]
    split: str | None
    split_in_rows: bool = False
    hub: HubDataset | None = None


def locate(
    path_or_id: str | Path,
    split: str | None,
    *,
    revision: str | None = None,
    cache_dir: str | Path | None = None,
    local_files_only: bool = False,
) -> Location:
    """Find the files of a split; an existing path wins over a hub id of the same name."""
    path, name = Path(path_or_id).expanduser(), str(path_or_id)
    if path.is_file():
        in_arrays = path.suffix.lower() == ".npz"
        return Location(
            name=name,
            files=(path,),
            split=split if in_arrays else None,
            split_in_rows=not in_arrays and split is not None,
        )
    hub = None
    if not path.is_dir():
        if not _REPO_ID.fullmatch(name):
            raise FileNotFoundError(
                f"There is no file or folder {name}, and it is not a hub id like owner/name."
            )
        hub = HubDataset(
            repo_id=name,
            revision=revision,
            cache_dir=cache_dir,
            local_files_only=local_files_only,
        )
        path = _download(hub, [f"*{kind}" for kind in KINDS if kind != ".npz"])
    splits = _splits(path)
    if not splits:
        raise FileNotFoundError(f"{name} holds no file of the kinds {', '.join(KINDS)}.")
    if split is None and len(splits) > 1:
        raise ValueError(
            f"{name} has several splits. Give split, one of {', '.join(sorted(splits))}."
        )
    if split is not None and split not in splits:
        if len(splits) > 1:
            raise unknown_name(f"split of {name}:", split, splits)
        # Such as the authors' VQA-RAD, whose one file says the split row by row.
        (files,) = splits.values()
        return Location(name=name, files=tuple(files), split=None, split_in_rows=True, hub=hub)
    found = split or next(iter(splits))
    return Location(name=name, files=tuple(splits[found]), split=found, hub=hub)


def find_image_root(
    where: Location, form: Format, records: Iterable[object], images: str | Path | None
) -> Path:
    """The folder that relative paths start from.

    It is the one given, or the one beside the file that has the most of the first images. An
    archive of the layout (`imgs.zip`) beside the file, or in its repo, is unpacked.
    """
    if images is not None:
        root = Path(images).expanduser()
        if not root.is_dir():
            raise FileNotFoundError(f"The image folder {images} does not exist.")
        return root
    folder = where.files[0].parent
    names = list(islice(_image_names(records, form), _FIRST))
    if not names:
        return folder
    candidates = [folder, *(folder / sub for sub in form.image_folders)]
    found = _root_of_most(candidates, names)
    if found is None and (unpacked := _unpack(where, form)) is not None:
        candidates = [
            root
            for base in unpacked
            for root in (base, *(base / sub for sub in form.image_folders))
        ]
        found = _root_of_most(candidates, names)
    return found or folder


def _root_of_most(candidates: Sequence[Path], names: Sequence[str]) -> Path | None:
    # A DICOM series is a folder. pathlib's exists raises an error for a name that is too long.
    counts = [sum(os.path.exists(root / name) for name in names) for root in candidates]
    return candidates[counts.index(max(counts))] if any(counts) else None


def _splits(folder: Path) -> dict[str, list[Path]]:
    """Files by split, as their names say it: `train.json`, `train-00000-of-00002-0123.parquet`."""
    found: dict[str, list[Path]] = {}
    for place in (folder, folder / "data", folder / "default"):
        for path in sorted(place.glob("*")) if place.is_dir() else ():
            if path.suffix.lower() in KINDS and path.is_file():
                is_parquet = path.suffix.lower() == ".parquet"
                found.setdefault(path.stem.split("-0")[0] if is_parquet else path.stem, []).append(
                    path
                )
    return {
        split: files if files[0].suffix.lower() == ".parquet" else files[:1]
        for split, files in found.items()
    }


def _image_names(records: Iterable[object], form: Format) -> Iterator[str]:
    for record in records:
        if not isinstance(record, Mapping):
            continue
        for key in form.image_keys:
            value = record.get(key)
            for name in value if isinstance(value, list | tuple) else [value]:
                name = name.get("path") if isinstance(name, Mapping) else name
                if isinstance(name, str) and name:
                    yield name


def _unpack(where: Location, form: Format) -> list[Path] | None:
    names = form.archives(where.split)
    if not names:
        return None
    folder = where.files[0].parent
    archives = [folder / name for name in names if (folder / name).is_file()]
    if not archives and where.hub is not None:
        folder = _download(where.hub, names)
        archives = [folder / name for name in names if (folder / name).is_file()]
    return [unpacked(path) for path in archives] or None


def _download(hub: HubDataset, patterns: Sequence[str]) -> Path:
    try:
        return Path(
            snapshot_download(
                hub.repo_id,
                repo_type="dataset",
                revision=hub.revision,
                cache_dir=hub.cache_dir,
                local_files_only=hub.local_files_only,
                allow_patterns=list(patterns),
            )
        )
    except (HfHubHTTPError, LocalEntryNotFoundError) as error:
        raise FileNotFoundError(
            f"{hub.repo_id} is not a file or folder here, and cannot be fetched from the hub as a "
            f"dataset: {error}. On a machine with a network, "
            f"type: hf download {hub.repo_id} --repo-type dataset"
        ) from error
