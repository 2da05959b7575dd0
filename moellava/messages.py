"""Error texts that several rooms share."""

from collections.abc import Collection
from difflib import get_close_matches


def unknown_name(kind: str, name: str, known: Collection[str]) -> ValueError:
    """The error for a name that no registry has: what was given, the nearest known name, and all of them."""
    near = get_close_matches(name, known, n=1)
    hint = f" Did you mean {near[0]!r}?" if near else ""
    return ValueError(f"Unknown {kind} {name!r}.{hint} Known: {', '.join(sorted(known))}.")
