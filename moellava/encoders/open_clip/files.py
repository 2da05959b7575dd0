"""The files of an open_clip checkpoint: its config, its weights, and which would be read."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from moellava.storage.sources import (
    JsonObject,
    Source,
    commit_of,
    file_exists,
    find_file,
    listing,
    not_fetched,
    read_json,
)

CONFIG_FILE = "open_clip_config.json"
# First match wins: safetensors before pickles. Single .pt/.pth files of other names come last.
WEIGHT_FILES = (
    "open_clip_model.safetensors",
    "open_clip_pytorch_model.safetensors",
    "open_clip_pytorch_model.bin",
    "open_clip_pytorch_model.pt",
    "open_clip_pytorch_model.pth",
)


@dataclass(frozen=True, kw_only=True)
class Resolved:
    """The files of a tower. A path is None if the hub has the file and this machine does not."""

    source: Source
    config_file: Path | None
    weights_name: str
    weights_file: Path | None

    @property
    def missing(self) -> list[str]:
        """Names of the files that would have to be fetched."""
        pairs = ((CONFIG_FILE, self.config_file), (self.weights_name, self.weights_file))
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


def resolve(source: Source, *, download: bool = False) -> Resolved:
    """Find the config and the weights of an open_clip tower, without loading them.

    With `download`, files that only the hub has are fetched; without, they are named and left
    there.
    """
    if source.folder is not None:
        return _resolve_folder(source, source.folder)
    config_file = find_file(source, CONFIG_FILE, download=download)
    if config_file is not None and (commit := commit_of(config_file)) is not None:
        source = source.at(commit)  # every further file comes from the same commit
    for name in _weight_names(source):
        weights_file = find_file(source, name, download=download, required=False)
        if weights_file is not None or (not download and file_exists(source, name)):
            return Resolved(
                source=source,
                config_file=config_file,
                weights_name=name,
                weights_file=weights_file,
            )
    raise OSError(_not_fetched(source, WEIGHT_FILES, "no file of weights was found"))


def read_open_clip_config(path: Path) -> JsonObject:
    """The parsed `open_clip_config.json`, the text keys' old spellings brought to the new ones."""
    config: JsonObject = read_json(path)
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


def is_saved_encoder(source: Source, *, download: bool = True) -> bool:
    """Whether `save_pretrained` of an encoder wrote the source, rather than open_clip."""
    if source.file is not None or find_file(source, CONFIG_FILE, download=download, required=False):
        return False
    path = find_file(source, "config.json", download=download, required=False)
    return path is not None and "model_type" in read_json(path)


def _resolve_folder(source: Source, folder: Path) -> Resolved:
    config_file = folder / CONFIG_FILE
    if not config_file.is_file():
        raise FileNotFoundError(
            f"{folder} has no {CONFIG_FILE}, which names the architecture and the preprocessing "
            f"of the weights. It holds {listing(folder)}."
        )
    known = (folder / name for name in WEIGHT_FILES)
    weights_file = source.file or next((path for path in known if path.is_file()), None)
    if weights_file is None:
        others = sorted([*folder.glob("*.pt"), *folder.glob("*.pth")])
        if len(others) != 1:
            raise FileNotFoundError(
                f"{folder} has {'several .pt/.pth files' if others else 'no weights'}; expected "
                f"one of {', '.join(WEIGHT_FILES)}, or a single .pt/.pth file. It holds "
                f"{listing(folder)}. Name the file itself to choose one."
            )
        weights_file = others[0]
    return Resolved(
        source=source,
        config_file=config_file,
        weights_name=weights_file.name,
        weights_file=weights_file,
    )


def _weight_names(source: Source) -> Iterator[str]:
    """Names worth asking for: those in the cache first, so that a filled cache needs no network."""
    cached = [name for name in WEIGHT_FILES if find_file(source, name, required=False) is not None]
    yield from cached
    yield from (name for name in WEIGHT_FILES if name not in cached)


def _not_fetched(source: Source, names: tuple[str, ...] | list[str], reason: str) -> str:
    both = f"{CONFIG_FILE} open_clip_pytorch_model.bin"
    return not_fetched(source, names, reason, example=both if len(names) > 1 else None)
