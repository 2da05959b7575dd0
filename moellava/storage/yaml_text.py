"""YAML text → Python's own types, without what YAML would pass over in silence: `load_yaml`."""

from collections.abc import Hashable

import yaml

from moellava.storage.limits import require_within


def load_yaml(text: str) -> object:
    """What a YAML text says; a key that stands twice in a mapping is an error.

    Raises:
        yaml.YAMLError: it is not YAML.
        ValueError: its aliases unfold into more values than the limit `values`, or it is nested too
            deeply.
    """
    try:
        return yaml.load(text, _Loader)
    except RecursionError:
        raise ValueError("It is nested too deeply. Write it flat.") from None


class _Loader(yaml.SafeLoader):  # type: ignore[misc]  # yaml has no types
    def get_single_node(self) -> yaml.Node | None:
        node: yaml.Node | None = super().get_single_node()
        require_within("values", _unfolded(node, {}), "YAML with aliases")
        return node

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


def _unfolded(node: yaml.Node | None, known: dict[int, int]) -> int:
    """How many values a node holds once each alias is a copy of what it names."""
    if not isinstance(node, yaml.CollectionNode):
        return 1
    if id(node) not in known:
        known[id(node)] = 1 << 62  # for an alias of a value inside that value
        is_mapping = isinstance(node, yaml.MappingNode)
        parts = [part for pair in node.value for part in pair] if is_mapping else node.value
        known[id(node)] = 1 + sum(_unfolded(part, known) for part in parts)
    return known[id(node)]
