"""What `load_pretrained_model` is asked for: a mapping, object or file → one `BuildRequest`."""

import os
from collections.abc import Collection, Mapping
from dataclasses import Field, asdict, dataclass, field, fields, is_dataclass
from pathlib import Path
from typing import Any, get_args

import yaml

from moellava.encoders import OptionValue, encoder_options
from moellava.messages import unknown_name
from moellava.model.tiling import Tiling
from moellava.settings import convert, from_mapping
from moellava.storage.errors import reading
from moellava.storage.yaml_text import load_yaml


@dataclass(frozen=True, kw_only=True)
class CustomVisionConfig:
    """How the image encoder is used, under the names of the BiomedCLIP integration guide."""

    image_size: int = 224  # pixels; position embeddings are interpolated if trained at another
    vision_feature_layer: int = -2  # as in LLaVA: -2 is the output of the last block but one
    vision_feature_select_strategy: str = "default"  # "default" drops the class token, "full" not


@dataclass(frozen=True, kw_only=True)
class BuildRequest:
    """The parts of a model that is to be built; field names are the keys that users write.

    Users write the encoder's options beside these keys, `{"image_size": 336, ...}`; here they are
    in `encoder_options`.
    """

    model_name_or_path: str = ""
    mm_vision_tower: str = ""
    mm_vision_tower_revision: str | None = None
    mm_hidden_size: int | None = None  # checked against the tower when given
    encoder_type: str | None = None  # None: detected from the tower's name
    projector_type: str | None = None  # None: mlp2x_gelu, or that of the trained projector
    projector_options: Mapping[str, object] | None = None  # see moellava.model.projector
    tiling: Tiling | None = None  # several views of a large image; None is one
    projector_path: str | None = None  # trained; see moellava.model.checkpoint.projector_file
    encoder_options: Mapping[str, OptionValue] = field(default_factory=dict)


# Other spellings of the same settings: LLaVA's, Med-MoE's and the BiomedCLIP guide's.
ALIASES = {
    "mm_projector_type": "projector_type",
    "mm_vision_select_layer": "select_layer",
    "vision_feature_layer": "select_layer",
    "mm_vision_select_feature": "select_feature",
    "vision_feature_select_strategy": "select_feature",
    "vision_tower": "mm_vision_tower",
    "pretrain_mm_mlp_adapter": "projector_path",
}
REQUIRED = {
    "model_name_or_path": "the language model, such as 'TinyLlama/TinyLlama-1.1B-Chat-v1.0'",
    "mm_vision_tower": "the image encoder, such as "
    "'microsoft/BiomedCLIP-PubMedBERT_256-vit_base_patch16_224'",
}
_OWN_KEYS = tuple(own.name for own in fields(BuildRequest) if own.name != "encoder_options")


def known_keys() -> list[str]:
    """The keys of a model description, those of the encoders' options included."""
    return [*_OWN_KEYS, *encoder_options()]


def is_description_file(model: object) -> bool:
    """Whether `model` names a YAML or JSON file, in place of a checkpoint's folder or id."""
    return isinstance(model, str | Path) and Path(model).suffix in (".yaml", ".yml", ".json")


def read_build_request(
    model: object,
    *,
    encoder_type: str | None = None,
    custom_vision_config: object = None,
    projector_config: object = None,
    required: Collection[str] = tuple(REQUIRED),
) -> BuildRequest:
    """Merge the mapping and the keywords into one request.

    Raises:
        ValueError: for an unknown key (the nearest known one is suggested), a missing one, a value
            of another type, or two different values for the same setting (both are named).
    """
    description = "model description"
    if is_description_file(model):
        description += f" {model}"
    found = _Settings()
    found.add(_as_mapping(model, f"the {description}"), f"the {description}")
    found.add({"encoder_type": encoder_type}, "the argument encoder_type")
    if custom_vision_config is not None:
        place = "custom_vision_config"
        found.add(_as_mapping(custom_vision_config, place), place)
    if projector_config is not None:
        place = "projector_config"
        found.add(_projector_settings(_as_mapping(projector_config, place)), place)
    for key in required:
        if key not in found.values:
            raise ValueError(
                f"The {description} has no {key!r}: {REQUIRED[key]}, as a hub id or a folder. "
                f"Found: {', '.join(sorted(found.values)) or 'nothing'}."
            )
    own = {key: value for key, value in found.values.items() if key in _OWN_KEYS}
    options = {key: value for key, value in found.values.items() if key not in _OWN_KEYS}
    request = {**own, "encoder_options": options}
    return from_mapping(BuildRequest, request, kind="key of a model description")


class _Settings:
    """Values by their keys, merged from several places, which may not contradict each other."""

    def __init__(self) -> None:
        self.values: dict[str, object] = {}
        self._places: dict[str, str] = {}

    def add(self, given: Mapping[str, object], place: str) -> None:
        """Take what one place says; None says nothing."""
        options = encoder_options()
        for name, value in given.items():
            key = ALIASES.get(name, name)
            if key not in _OWN_KEYS and key not in options:
                raise unknown_name(f"key in {place}:", name, [*known_keys(), *ALIASES])
            if value is None:
                continue
            if isinstance(value, os.PathLike):
                value = os.fspath(value)
            if key in options:
                value = _converted(options[key], value, name)
            earlier = self.values.setdefault(key, value)
            if earlier != value:
                raise ValueError(
                    f"{key} is {earlier!r} in {self._places[key]} and {value!r} in {place} (as "
                    f"{name!r}). Give it once, or the same value in both."
                )
            self._places.setdefault(key, place)


def _converted(option: Field[Any], value: object, name: str) -> object:
    """A value as its encoder option's type; text is a number, not a list of one word."""
    kind: type[object] = option.type  # type: ignore[assignment]  # a real type, not its name
    if isinstance(value, str) and int in get_args(kind):
        return convert(int, value, name)
    return convert(kind, value, name)


def _projector_settings(given: Mapping[str, object]) -> dict[str, object]:
    """`path`, `type` and the options of that type, under the keys of `BuildRequest`."""
    rest = {name: value for name, value in given.items() if value is not None}
    path, projector_type = rest.pop("path", None), rest.pop("type", None)
    if rest and projector_type is None:
        first = next(iter(rest))
        error = unknown_name("key in projector_config:", first, ("path", "type"))
        raise ValueError(f"{error} Options of a projector need its 'type' beside them.")
    return {
        "projector_path": path,
        "projector_type": projector_type,
        "projector_options": rest or None,
    }


def _read_file(path: Path) -> Mapping[str, object]:
    with reading(path.expanduser()):
        text = path.expanduser().read_text(encoding="utf-8")
        try:
            content = load_yaml(text)  # JSON is YAML too
        except yaml.YAMLError as error:
            kind = path.suffix[1:].upper()
            raise ValueError(f"{path} is not valid {kind}: {error}") from error
        _require_right_types(content)
    if not isinstance(content, Mapping):
        raise ValueError(
            f"{path} holds a {type(content).__name__}; expected keys such as model_name_or_path."
        )
    return content


def _require_right_types(content: object) -> None:
    """Check what a file says before other settings are added, so that its mistakes name it."""
    if isinstance(content, Mapping):
        found = _Settings()
        found.add(content, "the model description")
        own = {key: value for key, value in found.values.items() if key in _OWN_KEYS}
        from_mapping(BuildRequest, own, kind="key of a model description")


def _as_mapping(given: object, place: str) -> Mapping[str, object]:
    if isinstance(given, str | Path) and is_description_file(given):
        return _read_file(Path(given))
    if isinstance(given, Mapping):
        return given
    if is_dataclass(given) and not isinstance(given, type):
        return asdict(given)
    if hasattr(given, "__dict__") and not isinstance(given, type):
        return vars(given)
    raise TypeError(
        f"{place} is a {type(given).__name__}; give a mapping, a dataclass or an object with the "
        f"attributes {', '.join(known_keys())}."
    )
