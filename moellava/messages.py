"""Error texts that several rooms share."""

from collections.abc import Collection, Sequence
from difflib import get_close_matches


def unknown_name(kind: str, name: str, known: Collection[str]) -> ValueError:
    """The error for a name that no registry has: it, the nearest known one, and all of them."""
    return ValueError(
        f"Unknown {kind} {name!r}.{did_you_mean(name, known)} Known: {', '.join(sorted(known))}."
    )


def did_you_mean(name: str, known: Collection[str]) -> str:
    """` Did you mean 'x'?` for the nearest known name, or nothing."""
    near = get_close_matches(name, known, n=1)
    return f" Did you mean {near[0]!r}?" if near else ""


def first_names(names: Sequence[str], most: int = 5) -> str:
    """The names as one text, shortened to the first few and a count."""
    shown = ", ".join(names[:most])
    return shown if len(names) <= most else f"{shown} and {len(names) - most} more"
