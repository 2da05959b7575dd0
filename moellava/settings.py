"""Settings that users write (a mapping, a YAML file) → a checked dataclass: `from_mapping`, `known_keys`.

Values are checked and converted by pydantic against the types that the dataclass declares; unknown
keys are errors that suggest the nearest known one.
"""

import typing
from collections.abc import Mapping
from dataclasses import fields, is_dataclass
from typing import TypeVar

from pydantic import TypeAdapter, ValidationError

from moellava.messages import did_you_mean, unknown_name

T = TypeVar("T")


def from_mapping(cls: type[T], settings: Mapping[str, object], *, kind: str) -> T:
    """A dataclass of what a user wrote, nested sections included.

    Args:
        settings: keys are the fields of `cls`; a nested dataclass is a nested mapping.
        kind: what a key is called in messages, such as "recipe key".

    Raises:
        ValueError: an unknown key, or a value that its type does not admit; the key is named in full,
            such as `optimizer.learning_rate`, with what was found and what was expected.
    """
    _require_known(cls, settings, kind, "")
    _refuse_switches(cls, settings, "")
    try:
        return TypeAdapter(cls).validate_python(settings)
    except ValidationError as error:
        raise ValueError(_explain(cls, error, kind)) from error


def known_keys(cls: type, prefix: str = "") -> list[str]:
    """All keys, those of sections as `section.key`."""
    known = []
    for name, hint in typing.get_type_hints(cls).items():
        section = section_class(hint)
        known += known_keys(section, f"{prefix}{name}.") if section else [f"{prefix}{name}"]
    return known


def section_class(hint: object) -> type | None:
    """The dataclass that a field's type names, alone or beside None."""
    options = (hint, *typing.get_args(hint))
    return next((item for item in options if isinstance(item, type) and is_dataclass(item)), None)


def unknown_key(cls: type, name: str, kind: str) -> ValueError:
    """Suggests the nearest key; a key whose last word is what was typed is nearer than any other."""
    known = known_keys(cls)
    same_word = [key for key in known if key.rpartition(".")[2] == name.rpartition(".")[2]]
    if same_word:
        return ValueError(
            f"Unknown {kind} {name!r}. Did you mean {same_word[0]!r}? Known: {', '.join(known)}."
        )
    return unknown_name(kind, name, known)


def _require_known(cls: type, settings: Mapping[str, object], kind: str, prefix: str) -> None:
    hints = typing.get_type_hints(cls)
    for name, value in settings.items():
        if name not in hints:
            raise (
                unknown_key(cls, f"{prefix}{name}", kind)
                if not prefix
                else ValueError(
                    f"Unknown {kind} {prefix}{name!r}.{did_you_mean(name, list(hints))}"
                )
            )
        section = section_class(hints[name])
        if section is not None and isinstance(value, Mapping):
            _require_known(section, value, kind, f"{prefix}{name}.")


def _refuse_switches(cls: type, settings: Mapping[str, object], prefix: str) -> None:
    """A bool is an int to Python; `image_size: true` is a mistake all the same."""
    hints = typing.get_type_hints(cls)
    for name, value in settings.items():
        options = (hints[name], *typing.get_args(hints[name]))
        section = section_class(hints[name])
        if section is not None and isinstance(value, Mapping):
            _refuse_switches(section, value, f"{prefix}{name}.")
        elif (
            isinstance(value, bool) and bool not in options and (int in options or float in options)
        ):
            raise ValueError(f"{prefix}{name} is {value!r}; expected a number.")


def _explain(cls: type, error: ValidationError, kind: str) -> str:
    """The first problem in one sentence; pydantic's location and reason, without its page."""
    problem = error.errors(include_url=False)[0]
    known = {field.name for field in fields(cls)}
    path = [str(part) for part in problem["loc"]]
    keys = [part for index, part in enumerate(path) if index == 0 or part.isidentifier()]
    key = ".".join(keys) if keys and keys[0] in known else kind
    if problem["type"] == "value_error":  # raised by a dataclass's own __post_init__
        return str(problem["ctx"]["error"])
    reason = problem["msg"][:1].lower() + problem["msg"][1:]
    return f"{key} is {problem['input']!r}: {reason}."
