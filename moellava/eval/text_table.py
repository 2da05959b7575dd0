"""Scores as a table for the terminal: `text_table`."""

from collections.abc import Mapping, Sequence
from typing import Any

# A JSON object of scores.json.
Json = Mapping[str, Any]


def text_table(scores: Json) -> str:
    """Every metric with its interval, and the value of each baseline, in percent."""
    baselines = scores.get("baselines") or {}
    head = ["scorer", "metric", "value", "95 % interval", "n", *baselines]
    rows = [
        [scorer, metric, *_numbers(found), *_values(baselines, scorer, metric)]
        for scorer, entry in scores["scorers"].items()
        for metric, found in entry["metrics"].items()
    ]
    return _aligned([head, *rows])


def difference_table(comparison: Json, group_by: Sequence[str] = ()) -> str:
    """First minus second for every metric, with interval and McNemar's test.

    Args:
        group_by: groups that also have a part of the table for each of their values.
    """
    head = ["scorer", "metric", "difference", "95 % interval", "n", "first", "second", "p"]
    parts = [_aligned([head, *_difference_rows(comparison)])]
    for name in group_by:
        for value, found in comparison["groups"].get(name, {}).items():
            parts.append(f"\n{name}: {value}\n" + _aligned([head, *_difference_rows(found)]))
    return "\n".join(parts)


def _difference_rows(comparison: Json) -> list[list[str]]:
    return [
        [scorer, metric, *_numbers(found), *_changes(found)]
        for scorer, entry in comparison["scorers"].items()
        for metric, found in entry["metrics"].items()
    ]


def _numbers(found: Json) -> list[str]:
    interval = f"{100 * found['low']:.1f} to {100 * found['high']:.1f}"
    return [f"{100 * found['value']:.1f}", interval, str(found["n"])]


def _values(baselines: Json, scorer: str, metric: str) -> list[str]:
    found = [
        baseline["scorers"].get(scorer, {"metrics": {}})["metrics"].get(metric)
        for baseline in baselines.values()
    ]
    return ["" if one is None else f"{100 * one['value']:.1f}" for one in found]


def _changes(found: Json) -> list[str]:
    if "mcnemar_p" not in found:
        return ["", "", ""]
    return [str(found["only_first"]), str(found["only_second"]), f"{found['mcnemar_p']:.3g}"]


def _aligned(rows: Sequence[Sequence[str]]) -> str:
    """Names to the left, numbers to the right."""
    widths = [max(len(row[at]) for row in rows) for at in range(len(rows[0]))]
    lines = [
        "  ".join(
            cell.ljust(width) if at < 2 else cell.rjust(width)
            for at, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    ]
    return "\n".join(lines)
