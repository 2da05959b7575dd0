"""Where weights came from, in words that may be saved: never a path of this machine."""

import os
from typing import Any, NamedTuple

from moellava.encoders.sources import commit_of, find_file, parse_source


class Origin(NamedTuple):
    """A repo id, or a local folder's own name; and the commit, where the hub has one."""

    name: str
    revision: str | None

    def __str__(self) -> str:
        return f"{self.name}@{self.revision[:7]}" if self.revision else self.name


def origin_of(source: str | os.PathLike[str], **hub: Any) -> Origin:
    """The origin of a checkpoint that has just been read, a folder or hub id with a `config.json`."""
    parsed = parse_source(os.fspath(source), **hub)
    config_file = find_file(parsed, "config.json")
    return Origin(parsed.name, None if config_file is None else commit_of(config_file))
