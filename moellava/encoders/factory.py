"""A name in, a ready encoder out: `detect_encoder_type`, `create_encoder`, `register_encoder`.

The table `ENCODERS` names the built-in families as text: a tower's library loads only when it is chosen.
"""

import importlib
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModel
from typing_extensions import Unpack

from moellava.encoders.base import VisionEncoder, VisionEncoderConfig
from moellava.plugins import load_plugins
from moellava.storage.sources import (
    HubKeywords,
    HubOptions,
    Source,
    find_file,
    parse_source,
    read_json,
)

logger = logging.getLogger(__name__)

DEFAULT_BIOMEDCLIP = "microsoft/BiomedCLIP-PubMedBERT_256-vit_base_patch16_224"
ENTRY_POINT_GROUP = "moellava.encoders"


@dataclass(frozen=True, kw_only=True)
class EncoderKind:
    """One family: its name, how a source of it is recognised, its class (or "module:class", loaded late)."""

    name: str
    cls: str | type[VisionEncoder]
    words: tuple[str, ...] = ()  # in the last parts of a path or repo id, any case
    model_types: tuple[str, ...] = ()  # of a config.json
    detect: Callable[[str], bool] | None = None

    def encoder_class(self) -> type[VisionEncoder]:
        """The encoder class, its module imported if need be."""
        if isinstance(self.cls, str):
            module, name = self.cls.split(":")
            return getattr(importlib.import_module(f"moellava.encoders.{module}"), name)
        return self.cls


ENCODERS: list[EncoderKind] = [  # first match wins, so the longer words stand first
    EncoderKind(
        name="biomedclip",
        cls="biomedclip:BiomedClipEncoder",
        words=("biomedclip", "medclip"),
        model_types=("biomedclip_vision",),
    ),
    EncoderKind(
        name="siglip2",
        cls="siglip2:Siglip2Encoder",
        words=("naflex",),  # SigLIP 2's checkpoints of one fixed size are SigLIP to transformers
        model_types=("siglip2", "siglip2_vision_model", "moellava_siglip2_vision"),
    ),
    EncoderKind(
        name="siglip",
        cls="siglip:SiglipEncoder",
        words=("siglip",),
        model_types=("siglip", "siglip_vision_model", "moellava_siglip_vision"),
    ),
    EncoderKind(
        name="clip",
        cls="clip:ClipEncoder",
        words=("clip",),
        model_types=("clip", "clip_vision_model", "moellava_clip_vision"),
    ),
    EncoderKind(
        name="dinov2",
        cls="dinov2:Dinov2Encoder",
        words=("dinov2",),
        model_types=("dinov2", "dinov2_with_registers", "moellava_dinov2_vision"),
    ),
]


def register_encoder(
    name: str,
    config_class: type[VisionEncoderConfig],
    encoder_class: type[VisionEncoder],
    *,
    detect: Callable[[str], bool] | None = None,
) -> None:
    """Add an encoder family, for `create_encoder` and for transformers' Auto classes.

    Args:
        name: what `encoder_type` will say.
        detect: given a path or repo id, whether it is one of this family; asked before the built-in words.
    Raises:
        ValueError: the name, or the config's `model_type`, is taken by another class.
    """
    taken = next((kind for kind in ENCODERS if kind.name == name), None)
    if taken is not None and taken.cls is not encoder_class:
        raise ValueError(f"The encoder name {name!r} is taken by {taken.cls}; choose another name.")
    if encoder_class.config_class is not config_class:
        raise ValueError(
            f"{encoder_class.__name__}.config_class is {encoder_class.config_class.__name__}, but "
            f"{config_class.__name__} was given. Set config_class = {config_class.__name__} in the encoder."
        )
    AutoConfig.register(config_class.model_type, config_class, exist_ok=True)
    AutoModel.register(config_class, encoder_class, exist_ok=True)
    if taken is None:
        kind = EncoderKind(
            name=name, cls=encoder_class, model_types=(config_class.model_type,), detect=detect
        )
        ENCODERS.insert(0, kind)


def encoder_kinds() -> list[EncoderKind]:
    """All families, those of installed packages (entry-point group `moellava.encoders`) included."""
    load_plugins(ENTRY_POINT_GROUP)
    return ENCODERS


def detect_encoder_type(
    path: str | Path, *, download: bool = True, **hub: Unpack[HubKeywords]
) -> str:
    """The family of a tower: by the files of a local folder, else by its name, else by its config on the hub.

    Names are read in any case: "biomedclip" or "medclip" before "siglip" before "clip".
    With `download=False` only this machine is looked at. The other keywords are those of `HubOptions`.

    Raises:
        ValueError: nothing matches; the known families are listed.
    """
    kinds = encoder_kinds()
    for kind in kinds:
        if kind.detect is not None and kind.detect(str(path)):
            return kind.name
    source = parse_source(path, HubOptions(**hub))
    if source.folder is not None and (found := _by_files(source, download)) is not None:
        return found
    name = (
        source.name if source.folder is None else f"{source.folder.parent.name}/{source.name}"
    ).lower()
    for kind in kinds:
        # The last part of a name says more than the folder or the owner before it.
        if any(word in name.rsplit("/", 1)[-1] for word in kind.words):
            return kind.name
    for kind in kinds:
        if any(word in name for word in kind.words):
            return kind.name
    if source.folder is None and (found := _by_files(source, download)) is not None:
        return found
    raise ValueError(
        f"Cannot tell what kind of image tower {str(path)!r} is. Give encoder_type, one of "
        f"{', '.join(kind.name for kind in kinds)}."
    )


def create_encoder(
    encoder_type: str | None,
    model_name_or_path: str | Path | None = None,
    *,
    image_size: int | Sequence[int] | None = None,
    select_layer: int | Sequence[int] | None = None,
    select_feature: str | None = None,
    patch_tokens: str | None = None,
    final_norm: bool | None = None,
    load_text: bool = False,
    fallback_to_default: bool = False,
    device: torch.device | str | None = None,
    dtype: torch.dtype | str | None = None,
    revision: str | None = None,
    cache_dir: str | Path | None = None,
    local_files_only: bool = False,
    token: str | bool | None = None,
) -> VisionEncoder:
    """Find an image tower's weights and return it ready to use, in evaluation mode.

    Args:
        encoder_type: a family of `ENCODERS`; None or "auto" detects it from the source.
        model_name_or_path: see `moellava.storage.sources.parse_source`. None is the default BiomedCLIP, for
            `encoder_type="biomedclip"` only.
        image_size, select_layer, select_feature, patch_tokens, final_norm: see `VisionEncoderConfig`; None
            keeps the tower's own.
        load_text: BiomedCLIP only: load the text tower as well, for `encode_text` and `zero_shot`.
        fallback_to_default: BiomedCLIP only: where the source cannot be loaded, load the default BiomedCLIP
            instead, with a warning; the config records what was really loaded.
        dtype: of the weights; None is float32 for open_clip's files and as saved for others, "auto" as saved.
    Raises:
        ValueError, OSError: the source cannot be read as this family; never other or random weights.
    """
    hub = HubOptions(
        revision=revision, cache_dir=cache_dir, local_files_only=local_files_only, token=token
    )
    if model_name_or_path is None:
        if encoder_type != "biomedclip":
            raise ValueError(
                f"Which tower? Give model_name_or_path, for example {DEFAULT_BIOMEDCLIP!r}."
            )
        model_name_or_path = DEFAULT_BIOMEDCLIP
    kind = _kind(encoder_type, model_name_or_path, hub)
    given = {
        "image_size": image_size,
        "select_layer": select_layer,
        "select_feature": select_feature,
        "patch_tokens": patch_tokens,
        "final_norm": final_norm,
        "load_text": load_text or None,
        "dtype": dtype,
        "device": device,
    }
    overrides: dict[str, Any] = {name: value for name, value in given.items() if value is not None}
    if kind.name != "biomedclip":
        for name, value in (("load_text", load_text), ("fallback_to_default", fallback_to_default)):
            if value:
                raise ValueError(
                    f"{name} is for encoder_type='biomedclip'; this tower is {kind.name!r}."
                )
        return kind.encoder_class().from_pretrained(model_name_or_path, **hub.keywords, **overrides)
    return _create_biomedclip(kind, model_name_or_path, fallback_to_default, hub, overrides)


def _create_biomedclip(
    kind: EncoderKind,
    name: str | Path,
    fallback_to_default: bool,
    hub: HubOptions,
    overrides: dict[str, Any],
) -> VisionEncoder:
    if not any(word in str(name).lower() for word in kind.words) and not _has_open_clip_config(
        name, hub
    ):
        logger.warning(
            "%s does not look like a BiomedCLIP checkpoint; trying it all the same.", name
        )
    try:
        return kind.encoder_class().from_pretrained(name, **hub.keywords, **overrides)
    except (OSError, ValueError) as error:
        if not fallback_to_default or str(name) == DEFAULT_BIOMEDCLIP:
            raise
        logger.warning(
            "%s cannot be loaded (%s). Loading %s INSTEAD, as fallback_to_default=True allows.",
            name,
            error,
            DEFAULT_BIOMEDCLIP,
        )
    hub = hub.at(None)  # a revision of the tower asked for means nothing here
    return kind.encoder_class().from_pretrained(DEFAULT_BIOMEDCLIP, **hub.keywords, **overrides)


def _kind(encoder_type: str | None, name: str | Path, hub: HubOptions) -> EncoderKind:
    if encoder_type in (None, "auto"):
        encoder_type = detect_encoder_type(name, **hub.keywords)
    kinds = {kind.name: kind for kind in encoder_kinds()}
    assert encoder_type is not None
    if encoder_type not in kinds:
        near = get_close_matches(encoder_type, kinds, n=1)
        hint = f" Did you mean {near[0]!r}?" if near else ""
        raise ValueError(
            f"Unknown encoder_type {encoder_type!r}.{hint} Known: {', '.join(sorted(kinds))}."
        )
    return kinds[encoder_type]


def _by_files(source: Source, download: bool) -> str | None:
    """The family that a source's own config file names, if this machine has it or may fetch it."""
    for file_name in ("config.json", "open_clip_config.json"):
        path = find_file(source, file_name, download=download, required=False)
        if path is None:
            continue
        if file_name == "open_clip_config.json":
            return "biomedclip"
        model_type = read_json(path).get("model_type")
        for kind in encoder_kinds():
            if model_type in kind.model_types:
                return kind.name
    return None


def _has_open_clip_config(name: str | Path, hub: HubOptions) -> bool:
    try:
        source = parse_source(name, hub)
    except (OSError, ValueError):
        return False
    return source.folder is not None and (source.folder / "open_clip_config.json").is_file()
