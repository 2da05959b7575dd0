"""A YAML file of settings → a mapping, with `key=value` words over it.

| name | what it does |
|---|---|
| `read_settings` | the mapping that a file holds; a key that stands twice is an error |
| `override` | sets `section.key=value` words in it |
"""

from collections.abc import Hashable, Iterable, Mapping
from pathlib import Path

import yaml

from moellava.storage.errors import reading


def read_settings(path: Path) -> dict[str, object]:
    """The keys of a YAML file.

    Raises:
        OSError: the file cannot be read.
        ValueError: it is not YAML, a key stands twice, or it holds something else than keys.
    """
    with reading(path, "YAML"):
        settings = yaml.load(path.read_text(encoding="utf-8"), _Loader)
    if not isinstance(settings, dict):
        raise ValueError(
            f"{path} holds a {type(settings).__name__}; expected keys with their values."
        )
    return settings


def override(settings: dict[str, object], words: Iterable[str]) -> None:
    """Set `key=value` words in `settings`, values in YAML; dots go into sections.

    Raises:
        ValueError: a word that is not a setting.
    """
    for word in words:
        name, equals, text = word.partition("=")
        if not equals:
            raise ValueError(
                f"{word!r} is not a setting. Type key=value, such as optim.learning_rate=1e-4."
            )
        try:
            value = yaml.load(text, _Loader)
        except yaml.YAMLError as error:
            raise ValueError(f"{name}={text} is not valid YAML: {error}") from error
        _set(settings, name, value)


class _Loader(yaml.SafeLoader):  # type: ignore[misc]  # yaml has no types
    """Refuses a key that stands twice: YAML would keep the last one without a word."""

    def construct_mapping(
        self, node: yaml.MappingNode, deep: bool = False
    ) -> dict[Hashable, object]:
        names = [key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode)]
        for name in names:
            if names.count(name) > 1:
                raise yaml.constructor.ConstructorError(
                    None, None, f"the key {name!r} stands twice; join them", node.start_mark
                )
        mapping: dict[Hashable, object] = super().construct_mapping(node, deep)
        return mapping


def _set(settings: dict[str, object], name: str, value: object) -> None:
    section, dot, rest = name.partition(".")
    if not dot:
        settings[name] = value
        return
    old = settings.get(section)
    inner = dict(old) if isinstance(old, Mapping) else {}
    _set(inner, rest, value)
    settings[section] = inner
