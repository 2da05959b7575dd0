"""Where a dataset lies: the files of one split, and the folder of its images; on this machine or on the hub."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moellava.data.formats import Format
from moellava.data.records import KINDS
from moellava.messages import unknown_name

_REPO_ID = re.compile(r"[\w.-]+/[\w.-]+")
_IMAGE_KEYS = ("image", "images", "img_name", "image_name", "Figure_path")


@dataclass(frozen=True, kw_only=True)
class Location:
    """The files of one split.

    Args:
        name: the file, folder or id, as the user gave it.
        split: as the file's name says it, None where it says nothing.
        split_in_rows: whether the split must be looked for in the rows themselves.
        repo_id, revision, cache_dir, local_files_only: of a hub id, for archives of images.
    """

    name: str
    files: tuple[Path, ...]
    split: str | None
    split_in_rows: bool = False
    repo_id: str | None = None
    revision: str | None = None
    cache_dir: str | Path | None = None
    local_files_only: bool = False


def locate(
    path_or_id: str | Path,
    split: str | None,
    *,
    revision: str | None = None,
    cache_dir: str | Path | None = None,
    local_files_only: bool = False,
) -> Location:
    """Find the files of a split; an existing path wins over a hub id of the same name."""
    path = Path(path_or_id).expanduser()
    if path.is_file():
        in_arrays = path.suffix.lower() == ".npz"
        return Location(
            name=str(path_or_id),
            files=(path,),
            split=split if in_arrays else None,
            split_in_rows=not in_arrays and split is not None,
        )
    options: dict[str, Any] = {}
    if not path.is_dir():
        if not _REPO_ID.fullmatch(str(path_or_id)):
            raise FileNotFoundError(
                f"There is no file or folder {path_or_id}, and it is no hub id like owner/name."
            )
        options = {
            "repo_id": str(path_or_id),
            "revision": revision,
            "cache_dir": cache_dir,
            "local_files_only": local_files_only,
        }
        path = _download(options, [f"*{kind}" for kind in KINDS if kind != ".npz"])
    splits = _splits(path)
    if not splits:
        raise FileNotFoundError(f"{path_or_id} holds no file of the kinds {', '.join(KINDS)}.")
    if split is None:
        if len(splits) > 1:
            raise ValueError(
                f"{path_or_id} has several splits. Give split, one of {', '.join(sorted(splits))}."
            )
        (split,) = splits
        return Location(name=str(path_or_id), files=tuple(splits[split]), split=split, **options)
    if split in splits:
        return Location(name=str(path_or_id), files=tuple(splits[split]), split=split, **options)
    if len(splits) == 1:  # such as the authors' VQA-RAD, whose one file says the split row by row
        (files,) = splits.values()
        return Location(
            name=str(path_or_id), files=tuple(files), split=None, split_in_rows=True, **options
        )
    raise unknown_name(f"split of {path_or_id}:", split, splits)


def find_image_root(
    where: Location, form: Format, first: Mapping[str, Any], images: str | Path | None
) -> Path:
    """The folder that relative paths start from: the one given, or the first beside the file that has the first image.

    An archive of the layout (`imgs.zip`) beside the file, or in its repo, is unpacked into the cache of `datasets`.
    """
    if images is not None:
        root = Path(images).expanduser()
        if not root.is_dir():
            raise FileNotFoundError(f"The image folder {images} does not exist.")
        return root
    folder = where.files[0].parent
    name = _first_image_name(first)
    if name is None:
        return folder
    candidates = [folder, *(folder / sub for sub in form.image_folders)]
    found = next((root for root in candidates if (root / name).is_file()), None)
    if found is None and (unpacked := _unpack(where, form)) is not None:
        candidates = [
            root
            for base in unpacked
            for root in (base, *(base / sub for sub in form.image_folders))
        ]
        found = next((root for root in candidates if (root / name).is_file()), None)
    return found or folder


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


def _first_image_name(record: Mapping[str, Any]) -> str | None:
    for key in _IMAGE_KEYS:
        value = record.get(key)
        value = value[0] if isinstance(value, (list, tuple)) and value else value
        if isinstance(value, str):
            return value
    return None


def _unpack(where: Location, form: Format) -> list[Path] | None:
    archives = [where.files[0].parent / name for name in form.archives]
    archives = [path for path in archives if path.is_file()]
    if not archives and where.repo_id is not None and form.archives:
        wanted = form.archives
        # PMC-VQA's second version has files and archive of its own, both named with _2.
        if where.split is not None and len(wanted) > 1:
            is_second = where.split.endswith("_2")
            wanted = tuple(name for name in wanted if ("_2" in name) == is_second)
        folder = _download(vars(where), list(wanted))
        archives = [folder / name for name in wanted if (folder / name).is_file()]
    if not archives:
        return None
    from datasets import DownloadManager

    return [Path(DownloadManager().extract(str(path))) for path in archives]


def _download(options: Mapping[str, Any], patterns: Sequence[str]) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    try:
        return Path(
            snapshot_download(
                options["repo_id"],
                repo_type="dataset",
                revision=options["revision"],
                cache_dir=options["cache_dir"],
                local_files_only=options["local_files_only"],
                allow_patterns=list(patterns),
            )
        )
    except (HfHubHTTPError, LocalEntryNotFoundError) as error:
        raise FileNotFoundError(
            f"{options['repo_id']} is no file or folder here, and cannot be fetched from the hub as a dataset: "
            f"{error}. On a machine with a network, type: hf download {options['repo_id']} --repo-type dataset"
        ) from error
