"""Where a tower comes from: a hub id, a folder, a file; and which of its files would be read.

`parse_source` brings every spelling to one form, `resolve` finds the files, without loading them.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator
from dataclasses import dataclass, replace
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi, constants, hf_hub_download, try_to_load_from_cache
from huggingface_hub.errors import (
    EntryNotFoundError,
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.utils import validate_repo_id

logger = logging.getLogger(__name__)

CONFIG_FILE = "open_clip_config.json"
# First match wins: safetensors before pickles. Single .pt/.pth files of other names come last.
WEIGHT_FILES = (
    "open_clip_model.safetensors",
    "open_clip_pytorch_model.safetensors",
    "open_clip_pytorch_model.bin",
    "open_clip_pytorch_model.pt",
    "open_clip_pytorch_model.pth",
)
HUB_OPTIONS = ("revision", "cache_dir", "local_files_only", "token")
WEIGHT_SUFFIXES = (".safetensors", ".bin", ".pt", ".pth")


@dataclass(frozen=True, kw_only=True)
class Source:
    """One tower's origin. Exactly one of `folder` and `repo_id` is set."""

    name: str  # what a config records: the repo id, or a local folder's own name; never an absolute path
    folder: Path | None = None
    file: Path | None = None  # a weights file named by the user, inside `folder`
    repo_id: str | None = None
    revision: str | None = None
    cache_dir: str | Path | None = None
    local_files_only: bool = False
    token: str | bool | None = None

    @property
    def open_clip_name(self) -> str:
        """The spelling that open_clip wants."""
        return f"local-dir:{self.folder}" if self.folder else f"hf-hub:{self.repo_id}"


@dataclass(frozen=True, kw_only=True)
class Resolved:
    """The files of a tower. A path is None where the file is known to the hub but not on this machine."""

    source: Source
    config_name: str
    config_file: Path | None
    weights_name: str
    weights_file: Path | None

    @property
    def missing(self) -> list[str]:
        """Names of the files that would have to be fetched."""
        pairs = ((self.config_name, self.config_file), (self.weights_name, self.weights_file))
        return [name for name, path in pairs if path is None]

    @property
    def paths(self) -> tuple[Path, Path]:
        """(config, weights), both on this machine.

        Raises:
            OSError: one of them would have to be fetched first.
        """
        if self.config_file is None or self.weights_file is None:
            raise OSError(_not_fetched(self.source, self.missing, "it is not on this machine"))
        return self.config_file, self.weights_file


def parse_source(
    spec: str | Path,
    *,
    revision: str | None = None,
    cache_dir: str | Path | None = None,
    local_files_only: bool = False,
    token: str | bool | None = None,
) -> Source:
    """Read `owner/name`, `hf-hub:owner/name`, `local-dir:/x`, `/x`, `./x`, `~/x` or a weights file.

    An existing local path wins over the hub, whatever its name.

    Raises:
        FileNotFoundError: a path that does not exist; the nearest existing sibling is suggested.
        ValueError: neither a path nor a repo id.
    """
    text = str(spec).strip()
    hub: dict[str, Any] = {"cache_dir": cache_dir, "local_files_only": local_files_only, "token": token}
    if text.startswith("hf-hub:"):
        return _hub_source(text.removeprefix("hf-hub:"), revision, hub)
    is_local = text.startswith("local-dir:")
    path = Path(text.removeprefix("local-dir:")).expanduser()
    if text.removeprefix("local-dir:") and path.exists():
        return _local_source(path, revision, hub)
    if is_local or text.startswith(("/", "./", "../", "~", ".\\", "..\\")) or path.is_absolute():
        raise FileNotFoundError(_no_such_path(path))
    try:
        validate_repo_id(text)
    except HFValidationError as error:
        raise ValueError(
            f"{text!r} is neither an existing path nor a Hugging Face repo id ('owner/name'). {_near(path)}"
        ) from error
    return _hub_source(text, revision, hub)


def resolve(source: Source | str | Path, *, download: bool = False, **options: Any) -> Resolved:
    """Find the config and the weights of an open_clip tower, without loading them.

    With `download`, files that only the hub has are fetched; without, they are named and left there.
    Keyword options are those of `parse_source`.
    """
    if not isinstance(source, Source):
        source = parse_source(source, **options)
    if source.folder is not None:
        return _resolve_folder(source, source.folder)
    config_file = find_file(source, CONFIG_FILE, download=download)
    if config_file is not None and (commit := commit_of(config_file)) is not None:
        source = replace(source, revision=commit)  # every further file comes from the same commit
    for name in _weight_names(source):
        weights_file = find_file(source, name, download=download, required=False)
        if weights_file is not None or (not download and _on_hub(source, name)):
            return Resolved(
                source=source,
                config_name=CONFIG_FILE,
                config_file=config_file,
                weights_name=name,
                weights_file=weights_file,
            )
    raise OSError(_not_fetched(source, WEIGHT_FILES, "no file of weights was found"))


def find_file(source: Source, name: str, *, download: bool = False, required: bool = True) -> Path | None:
    """Path of one file of the source, or None where it is not there.

    Raises:
        OSError: `required`, and the file can be neither found nor fetched; the text has the command that
            fetches it.
    """
    if source.folder is not None:
        path = source.folder / name
        if path.is_file():
            return path
        if required:
            raise FileNotFoundError(f"{path} does not exist. {_near(path)}".strip())
        return None
    assert source.repo_id is not None
    cached = try_to_load_from_cache(
        source.repo_id, name, cache_dir=source.cache_dir, revision=source.revision or "main"
    )
    if isinstance(cached, str):
        return Path(cached)
    if not download:
        return None
    try:
        return Path(
            hf_hub_download(
                source.repo_id,
                name,
                revision=source.revision,
                cache_dir=source.cache_dir,
                local_files_only=source.local_files_only,
                token=source.token,
            )
        )
    except (GatedRepoError, RepositoryNotFoundError, RevisionNotFoundError) as error:
        raise OSError(_not_fetched(source, [name], str(error).splitlines()[0])) from error
    except (LocalEntryNotFoundError, EntryNotFoundError, HfHubHTTPError) as error:
        if required:
            reason = "it is not in the cache and the hub cannot be reached"
            if isinstance(error, EntryNotFoundError) and not isinstance(error, LocalEntryNotFoundError):
                reason = "the repo has no such file"
            raise OSError(_not_fetched(source, [name], reason)) from error
        return None


def read_open_clip_config(path: Path) -> dict[str, Any]:
    """The parsed `open_clip_config.json`, with the text keys' old spellings brought to the new ones."""
    config = read_json(path)
    model_cfg = config.get("model_cfg")
    if not isinstance(model_cfg, dict) or not isinstance(model_cfg.get("vision_cfg"), dict):
        raise ValueError(
            f"{path} has no model_cfg.vision_cfg, so it does not describe an image tower. "
            f"Found the keys {sorted(config)}; expected an {CONFIG_FILE} as open_clip writes it."
        )
    text_cfg = model_cfg.get("text_cfg")
    if isinstance(text_cfg, dict):
        for old, new in (("proj", "hf_proj_type"), ("pooler_type", "hf_pooler_type")):
            if old in text_cfg:
                text_cfg.setdefault(new, text_cfg.pop(old))
    return config


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file; a broken file is named."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ValueError(f"{path} is not valid JSON: {error}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} holds a JSON {type(content).__name__}; expected an object.")
    return content


def is_saved_encoder(source: Source, *, download: bool = True) -> bool:
    """Whether a source is what `save_pretrained` of an encoder wrote, rather than an open_clip checkpoint."""
    if source.file is not None or find_file(source, CONFIG_FILE, download=download, required=False):
        return False
    path = find_file(source, "config.json", download=download, required=False)
    return path is not None and "model_type" in read_json(path)


def commit_of(path: Path) -> str | None:
    """The commit that a file in a Hugging Face cache belongs to, None elsewhere."""
    parts = path.parts
    if "snapshots" in parts and any(part.startswith("models--") for part in parts):
        return parts[parts.index("snapshots") + 1]
    return None


# ---- local ----


def _local_source(path: Path, revision: str | None, hub: dict[str, Any]) -> Source:
    file = None
    if path.is_file():
        if path.suffix not in WEIGHT_SUFFIXES:
            raise ValueError(
                f"{path} is not a file of weights; expected one of {', '.join(WEIGHT_SUFFIXES)}, or a folder."
            )
        path, file = path.parent, path
    folder = path.absolute()
    if revision is not None and revision != commit_of(folder / CONFIG_FILE):
        raise ValueError(f"revision={revision!r} was given, but {folder} is a local folder. Leave revision out.")
    # A snapshot of the cache keeps the name that it has on the hub.
    repo = next((part for part in reversed(folder.parts) if part.startswith("models--")), None)
    commit = commit_of(folder / CONFIG_FILE)
    name = repo.removeprefix("models--").replace("--", "/", 1) if repo and commit else folder.resolve().name
    return Source(name=name, folder=folder, file=file and file.absolute(), revision=commit, **hub)


def _resolve_folder(source: Source, folder: Path) -> Resolved:
    config_file = folder / CONFIG_FILE
    if not config_file.is_file():
        raise FileNotFoundError(
            f"{folder} has no {CONFIG_FILE}, which names the architecture and the preprocessing of the "
            f"weights. It holds {_listing(folder)}."
        )
    weights_file = source.file or next((folder / n for n in WEIGHT_FILES if (folder / n).is_file()), None)
    if weights_file is None:
        others = sorted([*folder.glob("*.pt"), *folder.glob("*.pth")])
        if len(others) != 1:
            raise FileNotFoundError(
                f"{folder} has {'several .pt/.pth files' if others else 'no weights'}; expected one of "
                f"{', '.join(WEIGHT_FILES)}, or a single .pt/.pth file. It holds {_listing(folder)}. "
                "Name the file itself to choose one."
            )
        weights_file = others[0]
    return Resolved(
        source=source,
        config_name=CONFIG_FILE,
        config_file=config_file,
        weights_name=weights_file.name,
        weights_file=weights_file,
    )


def _listing(folder: Path) -> str:
    names = sorted(path.name for path in folder.iterdir())
    return ", ".join(names[:8]) + (f" and {len(names) - 8} more" if len(names) > 8 else "") if names else "nothing"


def _no_such_path(path: Path) -> str:
    return f"{path} does not exist. {_near(path)}".strip()


def _near(path: Path) -> str:
    """A sentence with the existing sibling whose name is nearest, or nothing."""
    if not path.parent.is_dir():
        return f"Nor does its folder {path.parent}."
    near = get_close_matches(path.name, [sibling.name for sibling in path.parent.iterdir()], n=1)
    return f"Did you mean {path.parent / near[0]}?" if near else ""


# ---- hub ----


def _hub_source(repo_id: str, revision: str | None, hub: dict[str, Any]) -> Source:
    try:
        validate_repo_id(repo_id)
    except HFValidationError as error:
        raise ValueError(f"{repo_id!r} is not a Hugging Face repo id ('owner/name'): {error}") from error
    return Source(name=repo_id, repo_id=repo_id, revision=revision, **hub)


def _weight_names(source: Source) -> Iterator[str]:
    """Names worth asking for: those in the cache first, so that a filled cache needs no network."""
    cached = [name for name in WEIGHT_FILES if find_file(source, name, required=False) is not None]
    yield from cached
    yield from (name for name in WEIGHT_FILES if name not in cached)


def _on_hub(source: Source, name: str) -> bool:
    if source.local_files_only or constants.HF_HUB_OFFLINE:
        return False
    assert source.repo_id is not None
    try:
        return HfApi(token=source.token).file_exists(source.repo_id, name, revision=source.revision)
    except (OSError, HfHubHTTPError) as error:
        raise OSError(_not_fetched(source, [name], str(error).splitlines()[0])) from error


def _not_fetched(source: Source, names: tuple[str, ...] | list[str], reason: str) -> str:
    revision = f" --revision {source.revision}" if source.revision else ""
    cache = f" --cache-dir {source.cache_dir}" if source.cache_dir else ""
    wanted = names[0] if len(names) == 1 else f"one of {', '.join(names)}"
    files = f"{CONFIG_FILE} open_clip_pytorch_model.bin" if len(names) > 1 else names[0]
    return (
        f"{source.repo_id}: cannot get {wanted}: {reason}. On a machine with access, run `hf download "
        f"{source.repo_id} {files}{revision}{cache}`, or copy the repo into a folder and give its path."
    )
