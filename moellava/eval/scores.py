"""A table of scores → `scores.json`: means with intervals, over all rows and by group.

| name | gives |
|---|---|
| `summarize` | the content of `scores.json` |
| `metric_dicts` | `scorers -> NAME -> {version, metrics -> METRIC -> {value, low, high, n}}` |
"""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import TypedDict

import numpy as np

from moellava.eval.prompts import PROMPTS
from moellava.eval.score_table import ScoreTable
from moellava.eval.scorers.registry import SCORERS
from moellava.eval.statistics import LEVEL, Interval, Resamples

MOST_VALUES = 50  # a group with more values is counted in `groups_not_scored`


class ScorerScores(TypedDict):
    version: str
    metrics: dict[str, dict[str, float]]


class Scores(TypedDict):
    scorers: dict[str, ScorerScores]


def summarize(table: ScoreTable, resamples: Resamples | None = None) -> dict[str, object]:
    """What `scores.json` says about one set of predictions; values are in 0..1."""
    resamples = resamples or Resamples(table.clusters)
    types: dict[str, dict[str, int]] = defaultdict(dict)
    for (answer_type, decided_by), count in table.answer_type_from.items():
        types[answer_type][decided_by] = count
    return {
        "num_questions": len(table.ids),
        "num_images": table.num_images,
        "num_images_seen": table.num_images_seen,
        "num_tokens": table.num_tokens,
        "answer_types": dict(types),
        "prompts": dict(table.prompts),
        "uses_gold_type": any(
            name in PROMPTS and PROMPTS[name].uses_gold_type for name in table.prompts
        ),
        "intervals": {
            "level": LEVEL,
            "method": "percentile bootstrap over images",
            "num_clusters": resamples.num_clusters,
            "num_resamples": resamples.num_resamples,
            "seed": resamples.seed,
        },
        "cut_answers": table.num_cut,
        "empty_answers": table.num_empty,
        "empty_truth": table.empty_truth,
        "scorers": metric_dicts(table, resamples.intervals(table.values))["scorers"],
        "groups": by_group(table, resamples),
        "groups_not_scored": {
            name: len(_values(table, name))
            for name in table.groups
            if name not in scored_groups(table)
        },
    }


def by_group(table: ScoreTable, resamples: Resamples) -> dict[str, dict[str, Scores]]:
    """The same scores for the rows of each value of each group."""
    found: dict[str, dict[str, Scores]] = {}
    for group in scored_groups(table):
        found[group] = {}
        for value in _values(table, group):
            rows = table.rows_of(group, value)
            found[group][value] = metric_dicts(table, resamples.intervals(table.values, rows))
    return found


def scored_groups(table: ScoreTable) -> list[str]:
    """The groups with at most `MOST_VALUES` values."""
    return [name for name in table.groups if len(_values(table, name)) <= MOST_VALUES]


def _values(table: ScoreTable, group: str) -> list[str]:
    return sorted({value for value in table.groups[group] if value is not None})


def metric_dicts(table: ScoreTable, intervals: Sequence[Interval]) -> Scores:
    """Intervals of the table's columns by scorer and metric; metrics without a row are left out."""
    scorers: dict[str, ScorerScores] = {}
    for (scorer, metric), interval in zip(table.metrics, intervals, strict=True):
        entry = scorers.setdefault(scorer, {"version": SCORERS[scorer].version, "metrics": {}})
        if interval.n and not np.isnan(interval.value):
            entry["metrics"][metric] = interval.as_dict()
    return {"scorers": scorers}


def headline(scores: Mapping[str, ScorerScores]) -> list[tuple[str, str, dict[str, float]]]:
    """(scorer, metric, interval) of every metric, for tables."""
    return [
        (scorer, metric, interval)
        for scorer, entry in scores.items()
        for metric, interval in entry["metrics"].items()
    ]
