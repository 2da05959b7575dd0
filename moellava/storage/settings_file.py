"""A YAML file of settings → a mapping, with `key=value` words over it.

| name | what it does |
|---|---|
| `read_settings` | the mapping that a file holds; a key that stands twice is an error |
| `override` | sets `section.key=value` words in it |
"""

from collections.abc import Iterable, Mapping
from pathlib import Path

import yaml

from moellava.storage.errors import reading
from moellava.storage.yaml_text import load_yaml


def read_settings(path: Path) -> dict[str, object]:
    """The keys of a YAML file.

    Raises:
        OSError: the file cannot be read.
        ValueError: it is not YAML, a key stands twice, or it holds something else than keys.
    """
    with reading(path, "YAML"):
        settings = load_yaml(path.read_text(encoding="utf-8"))
    if not isinstance(settings, dict):
        raise ValueError(
            f"{path} holds a {type(settings).__name__}; expected keys with their values."
        )
    return settings


def override(settings: dict[str, object], words: Iterable[str]) -> None:
    """Set `key=value` words in `settings`, values in YAML; dots go into sections.

    A later word wins over an earlier one.

    Raises:
        ValueError: a word that is not a setting.
    """
    for word in words:
        name, equals, text = word.partition("=")
        if not equals:
            raise ValueError(
                f"{word!r} is not a setting. Type key=value, such as image_size=336 or "
                "optim.learning_rate=1e-4."
            )
        try:
            value = load_yaml(text)
        except yaml.YAMLError as error:
            raise ValueError(f"{name}={text} is not valid YAML: {error}") from error
        _set(settings, name, value)


def _set(settings: dict[str, object], name: str, value: object) -> None:
    section, dot, rest = name.partition(".")
    if not dot:
        settings[name] = value
        return
    old = settings.get(section)
    inner = dict(old) if isinstance(old, Mapping) else {}
    _set(inner, rest, value)
    settings[section] = inner
