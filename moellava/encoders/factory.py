"""A name in, a ready encoder out.

create_encoder, detect_encoder_type     the ways in
encoder_options                         what may be chosen, for all families or one
ENCODERS, EncoderKind, kind_of          the table of families
register_encoder                        one more family

The table names the built-in families as text: a tower's library loads only when it is chosen.
"""

import importlib
import logging
from collections.abc import Callable
from dataclasses import Field, dataclass
from pathlib import Path
from typing import Any, cast

import torch
from transformers import AutoConfig, AutoModel
from typing_extensions import Unpack

from moellava.encoders.base import VisionEncoder
from moellava.encoders.configuration import (
    OptionValue,
    VisionEncoderConfig,
    check_options,
    options_of,
)
from moellava.encoders.open_clip.configuration import DEFAULT_BIOMEDCLIP
from moellava.encoders.open_clip.files import CONFIG_FILE as OPEN_CLIP_CONFIG
from moellava.messages import unknown_name
from moellava.plugins import load_plugins
from moellava.storage.sources import (
    HubKeywords,
    HubOptions,
    JsonObject,
    Source,
    find_file,
    parse_source,
    read_json,
)
from moellava.storage.weights import as_dtype, require_device

logger = logging.getLogger(__name__)

ENTRY_POINT_GROUP = "moellava.encoders"


@dataclass(frozen=True, kw_only=True)
class EncoderKind:
    """One family of encoders: its name, how a source of it is recognised, its class."""

    name: str
    cls: (
        str | type[VisionEncoder]
    )  # "module:class" of moellava.encoders is imported when it is needed
    words: tuple[str, ...] = ()  # in the last parts of a path or repo id, any case
    model_types: tuple[str, ...] = ()  # of a config.json
    config_files: tuple[str, ...] = ()  # files of other libraries that only this family has
    detect: Callable[[str], bool] | None = None
    options: tuple[str, ...] = ()  # of `create_encoder`, that only this family takes
    default: str | None = None  # the tower that is loaded if none is named

    def encoder_class(self) -> type[VisionEncoder]:
        """The encoder class, its module imported if need be."""
        if isinstance(self.cls, str):
            module, name = self.cls.split(":")
            found = getattr(importlib.import_module(f"moellava.encoders.{module}"), name)
            return cast(type[VisionEncoder], found)
        return self.cls

    def files(self, source: Source, *, download: bool = False) -> list[tuple[str, Path | None]]:
        """(name, path) of the files that would be loaded; None is not on this machine."""
        return self.encoder_class().tower_files(source, download=download)

    def is_named_in(self, name: str) -> bool:
        """Whether one of the family's words stands in a name."""
        return any(word in name.lower() for word in self.words)

    def owns_files_of(self, source: Source, *, download: bool = False) -> bool:
        """Whether a source has a file that only this family has."""
        return any(
            find_file(source, name, download=download, required=False) for name in self.config_files
        )


ENCODERS: list[EncoderKind] = [  # first match wins, so the longer words stand first
    EncoderKind(
        name="biomedclip",
        cls="biomedclip:BiomedClipEncoder",
        words=("biomedclip", "medclip"),
        model_types=("biomedclip_vision",),
        config_files=(OPEN_CLIP_CONFIG,),
        options=("load_text", "fallback_to_default"),
        default=DEFAULT_BIOMEDCLIP,
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
        detect: given a path or repo id, whether it is one of this family; asked before the built-in
            words.

    Raises:
        ValueError: the name, or the config's `model_type`, is taken by another class.
    """
    taken = next((kind for kind in ENCODERS if kind.name == name), None)
    if taken is not None and taken.cls is not encoder_class:
        raise ValueError(f"The encoder name {name!r} is taken by {taken.cls}; choose another name.")
    if encoder_class.config_class is not config_class:
        raise ValueError(
            f"{encoder_class.__name__}.config_class is {encoder_class.config_class.__name__}, but "
            f"{config_class.__name__} was given. Set config_class = {config_class.__name__} in the "
            "encoder."
        )
    AutoConfig.register(config_class.model_type, config_class, exist_ok=True)
    AutoModel.register(config_class, encoder_class, exist_ok=True)
    if taken is None:
        kind = EncoderKind(
            name=name, cls=encoder_class, model_types=(config_class.model_type,), detect=detect
        )
        ENCODERS.insert(0, kind)


def encoder_kinds() -> list[EncoderKind]:
    """All families, with those of installed packages (entry points in `moellava.encoders`)."""
    load_plugins(ENTRY_POINT_GROUP)
    return ENCODERS


def encoder_options(
    config_class: type[VisionEncoderConfig] | None = None,
) -> dict[str, Field[Any]]:
    """What a user may choose of an encoder, by name: fields of its config, for all families or one.

    Each has `default`, `type` and, in `metadata["help"]`, one sentence that explains it.
    """
    if config_class is not None:
        return options_of(config_class)
    found = options_of(VisionEncoderConfig)
    for kind in encoder_kinds():
        found = {**options_of(kind.encoder_class().config_class), **found}
    return found


def detect_encoder_type(
    path: str | Path, *, download: bool = True, **hub: Unpack[HubKeywords]
) -> str:
    """The family of a tower, by the files of a local folder, its name, or its config on the hub.

    Names are read in any case: "biomedclip" or "medclip" before "siglip" before "clip". With
    `download=False` only this machine is looked at. The other keywords are those of `HubOptions`.

    Raises:
        ValueError: nothing matches; the known families are listed.
    """
    kinds = encoder_kinds()
    for kind in kinds:
        if kind.detect is not None and kind.detect(str(path)):
            return kind.name
    source = parse_source(path, HubOptions(**hub))
    if source.folder is None:
        name = source.name
        found = _by_name(name) or _by_files(source, download)
    else:
        name = f"{source.folder.parent.name}/{source.name}"
        found = _by_files(source, download) or _by_name(name)
    if found is None:
        raise ValueError(
            f"Cannot tell what kind of image tower {str(path)!r} is. Give encoder_type, one of "
            f"{', '.join(kind.name for kind in kinds)}."
        )
    return found.name


def kind_of(
    encoder_type: str | None, name: str | Path, hub: HubOptions | None = None
) -> EncoderKind:
    """The family that `encoder_type` names; None or "auto" detects it from the source.

    Raises:
        ValueError: an unknown name; the nearest known one is suggested.
    """
    if encoder_type is None or encoder_type == "auto":
        encoder_type = detect_encoder_type(name, **(hub or HubOptions()).keywords)
    kinds = {kind.name: kind for kind in encoder_kinds()}
    if encoder_type not in kinds:
        raise unknown_name("encoder_type", encoder_type, kinds)
    return kinds[encoder_type]


def create_encoder(
    encoder_type: str | None,
    model_name_or_path: str | Path | None = None,
    *,
    load_text: bool = False,
    fallback_to_default: bool = False,
    device: torch.device | str | None = None,
    dtype: torch.dtype | str | None = None,
    revision: str | None = None,
    cache_dir: str | Path | None = None,
    local_files_only: bool = False,
    token: str | bool | None = None,
    **options: OptionValue,
) -> VisionEncoder:
    """Find an image tower's weights and return it ready to use, in evaluation mode.

    Args:
        encoder_type: a family of `ENCODERS`; None or "auto" detects it from the source.
        model_name_or_path: see `moellava.storage.sources.parse_source`. None is the default tower
            of a family that has one: BiomedCLIP.
        load_text: BiomedCLIP only: load the text tower as well, for `encode_text` and `zero_shot`.
        fallback_to_default: BiomedCLIP only: if the source cannot be loaded, load the default
            BiomedCLIP instead, with a warning; the config records what was really loaded.
        dtype: of the weights; None is float32 for open_clip's files and as saved for others, "auto"
            as saved.
        **options: `image_size`, `patch_tokens`, `select_layer`, `select_feature`, `final_norm` and
            a family's own: `encoder_options()` lists and explains them. None keeps the tower's own.

    Raises:
        ValueError, OSError: the source cannot be read as this family; never other or random
            weights.
        TypeError: the family has no such option.
    """
    require_device(device)
    as_dtype(dtype)
    hub = HubOptions(
        revision=revision, cache_dir=cache_dir, local_files_only=local_files_only, token=token
    )
    name = _default_of(encoder_type) if model_name_or_path is None else model_name_or_path
    kind = kind_of(encoder_type, name, hub)
    _refuse_options_of_others(kind, load_text=load_text, fallback_to_default=fallback_to_default)
    encoder_class = kind.encoder_class()
    chosen = {key: value for key, value in options.items() if value is not None}
    check_options(encoder_class.config_class, chosen, encoder_options(encoder_class.config_class))
    loading = {"device": device, "dtype": dtype, "load_text": load_text or None}
    keywords: JsonObject = {
        key: value for key, value in {**chosen, **loading}.items() if value is not None
    }
    if kind.config_files:
        _warn_if_unlike(kind, name, hub)
    try:
        return _loaded(encoder_class, name, hub, keywords)
    except (OSError, ValueError) as error:
        if not fallback_to_default or kind.default in (None, str(name)):
            raise
        logger.warning(
            "%s cannot be loaded (%s). Loading %s INSTEAD, as fallback_to_default=True allows.",
            name,
            error,
            kind.default,
        )
    assert kind.default is not None
    hub = hub.at(None)  # a revision of the tower asked for means nothing here
    return _loaded(encoder_class, kind.default, hub, keywords)


def _loaded(
    encoder_class: type[VisionEncoder], name: str | Path, hub: HubOptions, keywords: JsonObject
) -> VisionEncoder:
    encoder: VisionEncoder = encoder_class.from_pretrained(name, **hub.keywords, **keywords)
    return encoder


def _default_of(encoder_type: str | None) -> str:
    for kind in encoder_kinds():
        if kind.name == encoder_type and kind.default is not None:
            return kind.default
    raise ValueError(f"Which tower? Give model_name_or_path, for example {DEFAULT_BIOMEDCLIP!r}.")


def _refuse_options_of_others(kind: EncoderKind, **given: bool) -> None:
    """Refuse an option that only other families take."""
    for name, value in given.items():
        if value and name not in kind.options:
            owners = " or ".join(
                repr(kind.name) for kind in encoder_kinds() if name in kind.options
            )
            raise ValueError(f"{name} is for encoder_type={owners}; this tower is {kind.name!r}.")


def _warn_if_unlike(kind: EncoderKind, name: str | Path, hub: HubOptions) -> None:
    if kind.is_named_in(str(name)):
        return
    try:
        if kind.owns_files_of(parse_source(name, hub)):
            return
    except (OSError, ValueError):
        pass  # the loading that follows says what is wrong
    logger.warning(
        "%s does not look like a %s checkpoint; trying it all the same.", name, kind.name
    )


def _by_name(name: str) -> EncoderKind | None:
    """The family that a name speaks of; its last part says more than the folder before it."""
    kinds = encoder_kinds()
    for part in (name.rsplit("/", 1)[-1], name):
        for kind in kinds:
            if kind.is_named_in(part):
                return kind
    return None


def _by_files(source: Source, download: bool) -> EncoderKind | None:
    """The family that a source's own config file names, if this machine has it or may fetch it."""
    kinds = encoder_kinds()
    owner = next((kind for kind in kinds if kind.owns_files_of(source, download=download)), None)
    if owner is not None and owner.is_named_in(source.name):
        return owner  # a config.json that somebody has put beside its files does not count
    path = find_file(source, "config.json", download=download, required=False)
    model_type = None if path is None else read_json(path).get("model_type")
    return next((kind for kind in kinds if model_type in kind.model_types), owner)
