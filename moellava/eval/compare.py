"""Two tables of scores for the same rows → what differs: `paired_differences`, `compare`."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from moellava.eval.predictions import Prediction
from moellava.eval.score_table import ScoreTable, score_predictions
from moellava.eval.scorers.registry import SCORERS, Scorer
from moellava.eval.scores import ScorerScores
from moellava.eval.statistics import NUM_RESAMPLES, Floats, Ints, Resamples, mcnemar
from moellava.messages import first_names


@dataclass(frozen=True)
class Pairs:
    """The rows and metrics that two tables share, in one order.

    Args:
        metrics: M scorers and metrics.
        first, second: (N, M), `nan` where a metric does not apply.
        rows: numbers of the N rows in the first table.
    """

    metrics: list[tuple[str, str]]
    first: Floats
    second: Floats
    rows: Ints
    only_first: list[str]
    only_second: list[str]


def pair(first: ScoreTable, second: ScoreTable) -> Pairs:
    """Rows by id, metrics by name.

    Raises:
        ValueError: the tables share no row.
    """
    place = {row_id: number for number, row_id in enumerate(second.ids)}
    shared = [number for number, row_id in enumerate(first.ids) if row_id in place]
    if not shared:
        raise ValueError(
            f"The predictions share no row: {first_names(first.ids, 2)} against "
            f"{first_names(second.ids, 2)}. Compare predictions for the same data."
        )
    metrics = [metric for metric in first.metrics if metric in set(second.metrics)]
    others = [place[first.ids[number]] for number in shared]
    known = set(first.ids)
    return Pairs(
        metrics=metrics,
        first=first.values[np.ix_(shared, [first.metrics.index(one) for one in metrics])],
        second=second.values[np.ix_(others, [second.metrics.index(one) for one in metrics])],
        rows=np.array(shared, dtype=np.int64),
        only_first=[row_id for row_id in first.ids if row_id not in place],
        only_second=[row_id for row_id in second.ids if row_id not in known],
    )


def paired_differences(
    pairs: Pairs, clusters: Ints, among: Ints | None = None, *, num_resamples: int = NUM_RESAMPLES
) -> dict[str, ScorerScores]:
    """First minus second for every metric, with interval, and McNemar's test for rights and wrongs.

    Args:
        clusters: (N,) the image of each pair.
        among: numbers of the pairs that count; all if left out.
    """
    differences = Resamples(clusters, num_resamples=num_resamples).differences(
        pairs.first, pairs.second, among
    )
    found: dict[str, ScorerScores] = {}
    for m, ((scorer, metric), interval) in enumerate(zip(pairs.metrics, differences, strict=True)):
        if not interval.n:
            continue
        entry = found.setdefault(scorer, {"version": SCORERS[scorer].version, "metrics": {}})
        entry["metrics"][metric] = interval.as_dict()
        chosen = slice(None) if among is None else among
        test = mcnemar(pairs.first[chosen, m], pairs.second[chosen, m])
        if test is not None:
            entry["metrics"][metric] |= {
                "only_first": test.only_first,
                "only_second": test.only_second,
                "mcnemar_p": test.p_value,
            }
    return found


def compare(
    first: Sequence[Prediction],
    second: Sequence[Prediction],
    scorers: Sequence[Scorer],
    *,
    group_by: Sequence[str] | None = None,
    num_resamples: int = NUM_RESAMPLES,
) -> dict[str, object]:
    """Everything that differs between two models' predictions for the same rows.

    Returns:
        `scorers` and `groups` as in `scores.json`, each value first minus second; `changed`, the
        rows whose answer is right on one side only, by scorer; the rows that only one side has.
    """
    tables = [score_predictions(side, scorers, group_by=group_by) for side in (first, second)]
    pairs = pair(*tables)
    clusters = np.unique(tables[0].clusters[pairs.rows], return_inverse=True)[1].reshape(-1)
    groups: dict[str, dict[str, dict[str, object]]] = {}
    for name, values in tables[0].groups.items():
        here = [values[row] for row in pairs.rows]
        for value in sorted({value for value in here if value is not None}):
            among = np.flatnonzero([one == value for one in here])
            scores = paired_differences(pairs, clusters, among, num_resamples=num_resamples)
            groups.setdefault(name, {})[value] = {"scorers": scores}
    return {
        "num_pairs": len(pairs.rows),
        "only_first": pairs.only_first,
        "only_second": pairs.only_second,
        "scorers": paired_differences(pairs, clusters, num_resamples=num_resamples),
        "groups": groups,
        "changed": _changed(pairs, first, second),
    }


def _changed(
    pairs: Pairs, first: Sequence[Prediction], second: Sequence[Prediction]
) -> dict[str, list[dict[str, object]]]:
    """Rows that one side alone has right, for each scorer that says what is right."""
    one, other = ({prediction.id: prediction for prediction in side} for side in (first, second))
    ids = [prediction.id for prediction in first if prediction.truth.strip()]
    changed: dict[str, list[dict[str, object]]] = {}
    for m, (scorer, metric) in enumerate(pairs.metrics):
        if metric not in ("accuracy", "closed_accuracy") or scorer in changed:
            continue
        rows = np.flatnonzero(np.abs(pairs.first[:, m] - pairs.second[:, m]) == 1)
        changed[scorer] = [
            {
                "id": (row_id := ids[int(pairs.rows[row])]),
                "question": one[row_id].question,
                "truth": one[row_id].truth,
                "first": one[row_id].answer,
                "second": other[row_id].answer,
                "better": "first" if pairs.first[row, m] else "second",
            }
            for row in rows
        ]
    return changed
