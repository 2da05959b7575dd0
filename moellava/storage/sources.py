"""Where something lies: a folder, a file or a hub id, brought to one form.

HubOptions                          revision, cache, token: what every loader passes on
Source, parse_source                every spelling of a place → one `Source`
Origin, origin_of                   a place in words that may be saved
find_file, file_exists, commit_of   single files of a source
read_json                           a JSON object, with errors that name the file
"""

import json
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass, field, fields, replace
from difflib import get_close_matches
from pathlib import Path, PureWindowsPath
from typing import Any, NamedTuple, TypedDict

from huggingface_hub import HfApi, constants, hf_hub_download, try_to_load_from_cache
from huggingface_hub.errors import (
    EntryNotFoundError,
    GatedRepoError,
    HFValidationError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.utils import httpx  # type: ignore[attr-defined]  # the client it uses
from huggingface_hub.utils._validators import validate_repo_id

from moellava.messages import first_names
from moellava.storage.errors import reading
from moellava.storage.limits import require_bounded

WEIGHT_SUFFIXES = (".safetensors", ".bin", ".pt", ".pth")


JsonObject = dict[str, Any]  # of a file: what a value is, is checked where it is used


class HubKeywords(TypedDict, total=False):
    """The keywords of `HubOptions`, as transformers' loaders and our public functions take them."""

    revision: str | None
    cache_dir: str | Path | None
    local_files_only: bool
    token: str | bool | None


@dataclass(frozen=True, kw_only=True)
class HubOptions:
    """How the Hugging Face hub is asked; meanings as in transformers."""

    revision: str | None = None  # branch, tag or commit
    cache_dir: str | Path | None = None
    local_files_only: bool = False
    token: str | bool | None = field(default=None, repr=False)

    def at(self, revision: str | None) -> "HubOptions":
        """The same options with another revision: two parts of a model lie in two repos."""
        return replace(self, revision=revision)

    @property
    def keywords(self) -> HubKeywords:
        """For `from_pretrained`; a token that was not given is left out: the login is used."""
        given: HubKeywords = {
            "revision": self.revision,
            "cache_dir": self.cache_dir,
            "local_files_only": self.local_files_only,
        }
        return given if self.token is None else {**given, "token": self.token}


@dataclass(frozen=True, kw_only=True)
class Source:
    """The place of a checkpoint. Exactly one of `folder` and `repo_id` is set."""

    name: str  # what a config records: the repo id, or a folder's own name; never an absolute path
    folder: Path | None = None
    file: Path | None = None  # a weights file that the user named, inside `folder`
    repo_id: str | None = None
    hub: HubOptions = HubOptions()

    @property
    def revision(self) -> str | None:
        """What the user asked for; the commit once it is known."""
        return self.hub.revision

    def at(self, commit: str) -> "Source":
        """The same source, pinned to a commit."""
        return replace(self, hub=self.hub.at(commit))


class Origin(NamedTuple):
    """Where weights came from: a repo id or a folder's own name, and the commit if any."""

    name: str
    revision: str | None

    def __str__(self) -> str:
        return f"{self.name}@{self.revision[:7]}" if self.revision else self.name


def parse_source(spec: str | os.PathLike[str], hub: HubOptions | None = None) -> Source:
    """Read `owner/name`, `hf-hub:owner/name`, `local-dir:/x`, `/x`, `./x`, `~/x` or a weights file.

    An existing local path wins over the hub, whatever its name.

    Raises:
        FileNotFoundError: a path that does not exist; the nearest existing sibling is suggested.
        ValueError: neither a path nor a repo id.
    """
    hub = hub or HubOptions()
    text = os.fspath(spec).strip()
    if text.startswith("hf-hub:"):
        return _hub_source(text.removeprefix("hf-hub:"), hub)
    is_local = text.startswith("local-dir:")
    path = Path(text.removeprefix("local-dir:")).expanduser()
    if text.removeprefix("local-dir:") and path.exists():
        return _local_source(path, hub)
    if (
        is_local
        or text.startswith(("/", "./", "../", "~", "\\", ".\\", "..\\"))
        or _is_absolute(path)
    ):
        hint = _hub_id_in(path) or nearest_sibling(path)
        raise FileNotFoundError(f"{path} does not exist. {hint}".strip())
    try:
        validate_repo_id(text)
    except HFValidationError as error:
        raise ValueError(
            f"{text!r} is neither an existing path nor a Hugging Face repo id ('owner/name'). "
            f"{nearest_sibling(path)}"
        ) from error
    return _hub_source(text, hub)


def split_hub_keywords(keywords: JsonObject) -> tuple[HubOptions, JsonObject]:
    """The hub's options among the keywords of a `from_pretrained`, and the rest."""
    names = {field.name for field in fields(HubOptions)}
    hub = {name: value for name, value in keywords.items() if name in names}
    rest = {name: value for name, value in keywords.items() if name not in names}
    return HubOptions(**hub), rest


def origin_of(source: str | os.PathLike[str], hub: HubOptions | None = None) -> Origin:
    """The origin of a checkpoint that was just read: a folder or hub id with a `config.json`."""
    parsed = parse_source(source, hub)
    config_file = find_file(parsed, "config.json")
    return Origin(parsed.name, None if config_file is None else commit_of(config_file))


def find_file(
    source: Source, name: str, *, download: bool = False, required: bool = True
) -> Path | None:
    """Path of one file of the source, or None if it is not there.

    Raises:
        OSError: `required`, and the file can be neither found nor fetched; the text has the command
            that fetches it.
    """
    if source.folder is not None:
        path = source.folder / name
        if path.is_file():
            return path
        if required:
            raise FileNotFoundError(f"{path} does not exist. {nearest_sibling(path)}".strip())
        return None
    assert source.repo_id is not None
    hub = source.hub
    cached = try_to_load_from_cache(
        source.repo_id, name, cache_dir=hub.cache_dir, revision=hub.revision or "main"
    )
    if isinstance(cached, str):
        return Path(cached)
    if not download:
        return None
    try:
        return Path(hf_hub_download(source.repo_id, name, **hub.keywords))
    except (GatedRepoError, RepositoryNotFoundError, RevisionNotFoundError) as error:
        raise OSError(not_fetched(source, [name], str(error).splitlines()[0])) from error
    except (LocalEntryNotFoundError, EntryNotFoundError, httpx.HTTPError) as error:
        if not required:
            return None
        is_missing = isinstance(error, EntryNotFoundError)
        if is_missing and not isinstance(error, LocalEntryNotFoundError):
            reason = "the repo has no such file"
        else:
            reason = "it is not in the cache and the hub cannot be reached"
        raise OSError(not_fetched(source, [name], reason)) from error


def file_exists(source: Source, name: str) -> bool:
    """Whether the hub has a file; False without a network.

    Raises:
        OSError: the hub cannot be asked.
    """
    if source.hub.local_files_only or constants.HF_HUB_OFFLINE:
        return False
    assert source.repo_id is not None
    try:
        return HfApi(token=source.hub.token).file_exists(
            source.repo_id, name, revision=source.revision
        )
    except (OSError, httpx.HTTPError) as error:
        raise OSError(not_fetched(source, [name], str(error).splitlines()[0])) from error


def read_json(path: Path) -> dict[str, object]:
    """A JSON object from a file.

    Raises:
        ValueError: the file is not JSON, not an object, or a size in it is beyond its limit; the
            file is named.
    """
    with reading(path, "JSON"):
        content = json.loads(path.read_text(encoding="utf-8"))
    if not isinstance(content, dict):
        raise ValueError(f"{path} holds a JSON {type(content).__name__}; expected an object.")
    require_bounded(path, content)
    return content


def commit_of(path: Path) -> str | None:
    """The commit that a file in a Hugging Face cache belongs to, None elsewhere."""
    parts = path.parts
    if "snapshots" in parts and any(part.startswith("models--") for part in parts):
        return parts[parts.index("snapshots") + 1]
    return None


def listing(folder: Path) -> str:
    """Names of a folder's files for a message, the first eight and a count."""
    names = sorted(path.name for path in folder.iterdir())
    return first_names(names, 8) or "nothing"


def nearest_sibling(path: Path) -> str:
    """A sentence with the existing sibling whose name is nearest, or nothing."""
    if not path.parent.is_dir():
        return f"Nor does its folder {path.parent}."
    near = get_close_matches(path.name, [sibling.name for sibling in path.parent.iterdir()], n=1)
    return f"Did you mean {path.parent / near[0]}?" if near else ""


def not_fetched(
    source: Source, names: Sequence[str], reason: str, example: str | None = None
) -> str:
    """The text of an error about files that are not on this machine, with the command to type.

    Args:
        names: any one of these files would do.
        example: what to download, if not the first name.
    """
    revision = f" --revision {source.revision}" if source.revision else ""
    cache = f" --cache-dir {source.hub.cache_dir}" if source.hub.cache_dir else ""
    wanted = names[0] if len(names) == 1 else f"one of {', '.join(names)}"
    return (
        f"{source.repo_id}: cannot get {wanted}: {reason}. On a machine with access, run "
        f"`hf download {source.repo_id} {example or names[0]}{revision}{cache}`, or copy the repo "
        "into a folder and give its path."
    )


def _is_absolute(path: Path) -> bool:
    return path.is_absolute() or PureWindowsPath(path).is_absolute()


def _hub_id_in(path: Path) -> str:
    """A sentence for a path of another machine: the repo whose cache it was, or that it is one."""
    parts = re.split(r"[/\\]", str(path))
    cached = next((part for part in parts if part.startswith("models--")), None)
    if cached:
        repo_id = cached.removeprefix("models--").replace("--", "/", 1)
        return f"It is another machine's cache of {repo_id!r}; give that id."
    if PureWindowsPath(path).is_absolute() and not path.is_absolute():
        return (
            "It is a path of Windows, and this is another machine. Give a folder here, or a hub id."
        )
    return ""


def _local_source(path: Path, hub: HubOptions) -> Source:
    file = None
    if path.is_file():
        if path.suffix not in WEIGHT_SUFFIXES:
            raise ValueError(
                f"{path} is not a file of weights; expected one of {', '.join(WEIGHT_SUFFIXES)}, "
                "or a folder."
            )
        path, file = path.parent, path
    folder = path.absolute()
    commit = commit_of(folder / "config.json")
    if hub.revision is not None and hub.revision != commit:
        raise ValueError(
            f"revision={hub.revision!r} was given, but {folder} is a local folder. "
            "Leave revision out."
        )
    # A snapshot of the cache keeps the name that it has on the hub.
    repo = next((part for part in reversed(folder.parts) if part.startswith("models--")), None)
    if repo and commit:
        name = repo.removeprefix("models--").replace("--", "/", 1)
    else:
        name = folder.resolve().name
    return Source(name=name, folder=folder, file=file and file.absolute(), hub=hub.at(commit))


def _hub_source(repo_id: str, hub: HubOptions) -> Source:
    try:
        validate_repo_id(repo_id)
    except HFValidationError as error:
        raise ValueError(
            f"{repo_id!r} is not a Hugging Face repo id ('owner/name'): {error}"
        ) from error
    return Source(name=repo_id, repo_id=repo_id, hub=hub)
