"""Settings that users write (a mapping, a YAML file) → a checked dataclass.

Values are checked and converted by pydantic against the types that the dataclass declares.

| name | what it does |
|---|---|
| `from_mapping` | a dataclass of a mapping, with its sections |
| `convert` | one value as a type |
| `known_keys`, `unknown_key` | all keys of a dataclass, and the error that suggests one of them |
"""

import math
import types
import typing
from collections.abc import Callable, Iterable, Mapping
from dataclasses import is_dataclass
from types import MappingProxyType
from typing import Literal, TypeVar

from pydantic import TypeAdapter, ValidationError
from pydantic_core import ErrorDetails

from moellava.messages import did_you_mean, unknown_name

T = TypeVar("T")

# What was expected, by the beginning of pydantic's name for the problem.
_EXPECTED = {
    "int_": "a whole number",
    "float_": "a number",
    "finite_number": "a finite number",
    "bool_": "true or false",
    "string_": "text",
    "path_": "a path",
    "tuple_": "a list",
    "list_": "a list",
    "mapping_": "a mapping",
    "dict_": "a mapping",
    "none_": "nothing",
    "greater_than_equal": "{ge} or more",
    "greater_than": "more than {gt}",
    "less_than_equal": "{le} or less",
    "less_than": "less than {lt}",
}


def from_mapping(
    cls: type[T],
    settings: Mapping[str, object],
    *,
    kind: str,
    meanings: Mapping[str, str] = MappingProxyType({}),
) -> T:
    """A dataclass of what a user wrote, nested sections included.

    Text that reads as a number is one where a number is expected (YAML reads `1e-3` as text), and
    a single word is a list of one. A bool is not a number.

    Args:
        settings: keys are the fields of `cls`; a nested dataclass is a nested mapping.
        kind: what a key is called in messages, such as "recipe key".
        meanings: what an unknown key is taken to mean in the error, such as `lr` to
            `optim.learning_rate`.

    Raises:
        ValueError: an unknown key, or a value that its type does not admit; the key is named in
            full, such as `optim.learning_rate`, with what was found and what was expected.
    """
    _require_known(cls, settings, "", lambda name: unknown_key(cls, name, kind, meanings))
    return _checked(cls, _prepared(cls, settings, ""), kind)


def convert(hint: type[T], value: object, key: str) -> T:
    """One value as the type `hint`, under the rules of `from_mapping`.

    Raises:
        ValueError: naming `key`, what was found and what was expected.
    """
    return _checked(hint, _prepare(hint, value, key), key)


def known_keys(cls: type, prefix: str = "") -> list[str]:
    """All keys, those of sections as `section.key`."""
    known = []
    for name, hint in typing.get_type_hints(cls).items():
        section = section_class(hint)
        known += known_keys(section, f"{prefix}{name}.") if section else [f"{prefix}{name}"]
    return known


def section_class(hint: object) -> type | None:
    """The dataclass that a field's type names, alone or beside None."""
    options = _options(hint)
    return next((item for item in options if isinstance(item, type) and is_dataclass(item)), None)


def unknown_key(
    cls: type, name: str, kind: str, meanings: Mapping[str, str] = MappingProxyType({})
) -> ValueError:
    """The error for a key that `cls` does not have; it suggests the nearest one.

    A key that the last word means, or that ends in it, is nearer than any other spelling.
    """
    known = known_keys(cls)
    word = name.rpartition(".")[2]
    meant = [meanings[word]] if word in meanings else []
    meant += [key for key in known if key.rpartition(".")[2] == word]
    if not meant:
        return unknown_name(kind, name, known)
    return ValueError(
        f"Unknown {kind} {name!r}. Did you mean {meant[0]!r}? Known: {', '.join(known)}."
    )


def _require_known(
    cls: type, settings: Mapping[str, object], prefix: str, unknown: Callable[[str], ValueError]
) -> None:
    hints = typing.get_type_hints(cls)
    for name, value in settings.items():
        if name not in hints:
            raise unknown(f"{prefix}{name}")
        section = section_class(hints[name])
        if section is not None and isinstance(value, Mapping):
            _require_known(section, value, f"{prefix}{name}.", unknown)


def _prepared(cls: type, settings: Mapping[str, object], prefix: str) -> dict[str, object]:
    hints = typing.get_type_hints(cls, include_extras=True)
    return {
        name: _prepare(hints[name], value, f"{prefix}{name}") for name, value in settings.items()
    }


def _prepare(hint: object, value: object, key: str) -> object:
    """What pydantic would take otherwise: a bool for a number, and a word for a list of words."""
    if isinstance(value, float) and not math.isfinite(value):
        raise ValueError(f"{key} is {value}; expected a finite number.")
    options = _options(hint)
    section = section_class(hint)
    if section is not None and not isinstance(value, section):
        if isinstance(value, Mapping):
            return _prepared(section, value, f"{key}.")
        if value is not None or types.NoneType not in options:
            keys = ", ".join(known_keys(section))
            raise ValueError(f"{key} is {value!r}, but it is a section with the keys {keys}.")
    if isinstance(value, bool) and bool not in options and {int, float} & set(options):
        raise ValueError(f"{key} is {value!r}; expected a number.")
    if isinstance(value, str) and str not in options:
        origins = {typing.get_origin(option) or option for option in options}
        if origins & {list, tuple}:
            return (value,)
    return value


def _options(hint: object) -> tuple[object, ...]:
    """The types that a field may have: those of a union, or the one; `Annotated` is unpacked."""
    origin = typing.get_origin(hint)
    if origin is typing.Annotated:
        return _options(typing.get_args(hint)[0])
    if origin in (types.UnionType, typing.Union):
        return tuple(option for item in typing.get_args(hint) for option in _options(item))
    return (hint,)


def _checked(hint: type[T], value: object, name: str) -> T:
    try:
        return TypeAdapter(hint).validate_python(value)
    except ValidationError as error:
        raise ValueError(_explain(hint, error.errors(include_url=False), name)) from error


def _explain(hint: type, problems: list[ErrorDetails], name: str) -> str:
    """The first key that is wrong in one sentence, with every type that it could have had."""
    first = problems[0]
    if first["type"] == "value_error":  # raised by a dataclass's own __post_init__
        return str(first["ctx"]["error"])
    keys = [_keys_of(hint, problem["loc"]) for problem in problems]
    if first["type"] == "missing":
        return f"The {name} {'.'.join(keys[0])!r} is missing."
    same_key = [problem for problem, key in zip(problems, keys, strict=True) if key == keys[0]]
    found, expected = first["input"], " or ".join(dict.fromkeys(map(_expected, same_key)))
    choices = [choice for option in _hints_at(hint, keys[0]) for choice in _choices(option)]
    if isinstance(found, str) and choices:
        expected += f".{did_you_mean(found, choices)}".rstrip(".")
    label = ".".join(keys[0]) or name
    return f"{label} is {found!r}; expected {expected}{'' if expected.endswith('?') else '.'}"


def _expected(problem: ErrorDetails) -> str:
    if problem["type"] == "literal_error":
        return f"one of {problem['ctx']['expected']}"
    for beginning, words in _EXPECTED.items():
        if problem["type"].startswith(beginning):
            return words.format(**problem.get("ctx", {}))
    return problem["msg"][:1].lower() + problem["msg"][1:]


def _keys_of(hint: type, location: Iterable[int | str]) -> list[str]:
    """The keys in pydantic's location, which also names the members of unions."""
    keys: list[str] = []
    cls: type | None = section_class(hint)
    for part in location:
        if cls is None or part not in (hints := typing.get_type_hints(cls)):
            break
        keys.append(str(part))
        cls = section_class(hints[str(part)])
    return keys


def _hints_at(hint: type, keys: list[str]) -> tuple[object, ...]:
    found: object = hint
    for key in keys:
        section = section_class(found)
        assert section is not None
        found = typing.get_type_hints(section)[key]
    return _options(found)


def _choices(option: object) -> tuple[str, ...]:
    if typing.get_origin(option) is not Literal:
        return ()
    return tuple(map(str, typing.get_args(option)))
