"""What a user asks `load_pretrained_model` for: a mapping, dataclass, object or file → one checked `BuildRequest`."""

from collections.abc import Collection, Mapping
from dataclasses import asdict, dataclass, fields, is_dataclass
from pathlib import Path
from typing import Any

import yaml

from moellava.messages import unknown_name


@dataclass(frozen=True, kw_only=True)
class CustomVisionConfig:
    """How the image encoder is used, under the names of the BiomedCLIP integration guide."""

    image_size: int = (
        224  # pixels; position embeddings are interpolated where the tower was trained at another
    )
    vision_feature_layer: int = -2  # LLaVA's meaning: -2 is the output of the last block but one
    vision_feature_select_strategy: str = (
        "default"  # "default" drops the class token, "full" keeps it
    )


@dataclass(frozen=True, kw_only=True)
class BuildRequest:
    """The parts of a model that is to be built; field names are the keys that users write."""

    model_name_or_path: str = ""
    mm_vision_tower: str = ""
    mm_vision_tower_revision: str | None = None
    mm_hidden_size: int | None = None  # checked against the tower when given
    encoder_type: str | None = None  # None: detected from the tower's name
    projector_type: str | None = None  # None: mlp2x_gelu, or that of the trained projector
    projector_options: Mapping[str, Any] | None = None  # of that type; see moellava.model.projector
    projector_path: str | Path | None = (
        None  # a trained projector; see moellava.model.checkpoint.projector_file
    )
    image_size: int | None = None
    vision_feature_layer: int | None = None
    vision_feature_select_strategy: str | None = None


# LLaVA's and Med-MoE's own spellings of the same settings.
ALIASES = {
    "mm_projector_type": "projector_type",
    "mm_vision_select_layer": "vision_feature_layer",
    "mm_vision_select_feature": "vision_feature_select_strategy",
    "vision_tower": "mm_vision_tower",
    "pretrain_mm_mlp_adapter": "projector_path",
}
KNOWN_KEYS = tuple(field.name for field in fields(BuildRequest))


REQUIRED = {
    "model_name_or_path": "the language model, such as 'TinyLlama/TinyLlama-1.1B-Chat-v1.0'",
    "mm_vision_tower": "the image encoder, such as 'microsoft/BiomedCLIP-PubMedBERT_256-vit_base_patch16_224'",
}


def is_description_file(model: Any) -> bool:
    """Whether `model` names a YAML or JSON file, in place of a checkpoint's folder or id."""
    return isinstance(model, str | Path) and Path(model).suffix in (".yaml", ".yml", ".json")


def read_build_request(
    model: Any,
    *,
    encoder_type: str | None = None,
    custom_vision_config: Any = None,
    projector_config: Any = None,
    required: Collection[str] = tuple(REQUIRED),
) -> BuildRequest:
    """Merge the mapping and the keywords into one request.

    Raises:
        ValueError: for an unknown key (the nearest known one is suggested), a missing one, or two
            different values for the same setting (both are named).
    """
    settings: dict[str, Any] = {}
    _merge(settings, _as_mapping(model, "the model description"), "the model description")
    if encoder_type is not None:
        _merge(settings, {"encoder_type": encoder_type}, "the argument encoder_type")
    if custom_vision_config is not None:
        _merge(
            settings,
            _as_mapping(custom_vision_config, "custom_vision_config"),
            "custom_vision_config",
        )
    if projector_config is not None:
        _merge(
            settings,
            _projector_settings(_as_mapping(projector_config, "projector_config")),
            "projector_config",
        )
    values = {key: value for key, (value, _) in settings.items()}
    for key in required:
        if key not in values:
            raise ValueError(
                f"The model description has no {key!r}: {REQUIRED[key]}, as a hub id or a folder. "
                f"Found: {', '.join(sorted(values)) or 'nothing'}."
            )
    return BuildRequest(**values)


def _projector_settings(given: Mapping[str, Any]) -> dict[str, Any]:
    """`path`, `type` and the options of that type, flat as users write them, under the keys of `BuildRequest`."""
    rest = {name: value for name, value in given.items() if value is not None}
    settings = {
        key: rest.pop(name, None)
        for name, key in (("path", "projector_path"), ("type", "projector_type"))
    }
    if rest and settings["projector_type"] is None:
        first = next(iter(rest))
        raise unknown_name(
            "key in projector_config:", first, ("path", "type", "the options of a given type")
        )
    return settings | {"projector_options": rest or None}


def _merge(settings: dict[str, Any], given: Mapping[str, Any], place: str) -> None:
    """Add `given` to `settings`, which maps a key to its value and the place where it was said."""
    for name, value in given.items():
        key = ALIASES.get(name, name)
        if key not in KNOWN_KEYS:
            raise unknown_name(f"key in {place}:", name, [*KNOWN_KEYS, *ALIASES])
        if value is None:
            continue
        earlier = settings.setdefault(key, (value, place))
        if earlier[0] != value:
            raise ValueError(
                f"{key} is {earlier[0]!r} in {earlier[1]} and {value!r} in {place} (as {name!r}). "
                "Say it once, or alike."
            )


def _read_file(path: Path) -> Mapping[str, Any]:
    try:
        content = yaml.safe_load(path.expanduser().read_text(encoding="utf-8"))  # JSON is YAML too
    except yaml.YAMLError as error:
        raise ValueError(f"{path} is not valid {path.suffix[1:].upper()}: {error}") from error
    if not isinstance(content, Mapping):
        raise ValueError(
            f"{path} holds a {type(content).__name__}; expected keys such as model_name_or_path."
        )
    return content


def _as_mapping(given: Any, place: str) -> Mapping[str, Any]:
    if is_description_file(given):
        return _read_file(Path(given))
    if isinstance(given, Mapping):
        return given
    if is_dataclass(given) and not isinstance(given, type):
        return asdict(given)
    if hasattr(given, "__dict__") and not isinstance(given, type):
        return vars(given)
    raise TypeError(
        f"{place} is a {type(given).__name__}; give a mapping, a dataclass or an object with the attributes "
        f"{', '.join(KNOWN_KEYS)}."
    )
