"""Installed packages that extend a registry: `load_plugins`."""

from functools import cache
from importlib.metadata import entry_points


@cache
def load_plugins(group: str) -> None:
    """Call every entry point of a group, once per process.

    Args:
        group: such as `moellava.encoders`; each entry point names a function without arguments that
            registers something (`register_encoder`, `register_projector`, `register_format`, ...).
    """
    for entry in entry_points(group=group):
        entry.load()()
