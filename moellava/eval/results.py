"""Predictions in files → `scores.json` and `report.html`: `write_results`."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from moellava.eval.compare import pair, paired_differences
from moellava.eval.judge import Judge, describe, judge_answers
from moellava.eval.predictions import Prediction, read_predictions
from moellava.eval.probabilities import probability_scores
from moellava.eval.report import write_report
from moellava.eval.score_table import ScoreTable, score_predictions
from moellava.eval.scorers import find_scorers
from moellava.eval.scores import metric_dicts, scored_groups, summarize
from moellava.eval.statistics import NUM_RESAMPLES, Resamples
from moellava.storage.writing import write_json

FORMAT = 1  # of scores.json


def write_results(
    out: Path,
    predictions: Sequence[Prediction],
    *,
    scorers: Sequence[str] = (),
    group_by: Sequence[str] | None = None,
    baselines: Mapping[str, Path] | None = None,
    num_resamples: int = NUM_RESAMPLES,
    leaked: Sequence[str] | None = None,
    facts: Mapping[str, object] | None = None,
    load_image: Callable[[str], Image.Image] | None = None,
    judge: Judge | None = None,
) -> dict[str, object]:
    """Score the predictions of a model and of its baselines.

    Args:
        out: gets `scores.json` and `report.html`.
        predictions: in the order of the data.
        baselines: name → file, for the same questions.
        leaked: ids of questions about images of the training set; None if nobody looked.
        facts: of how the answers were made, kept as they are.
        load_image: the picture of a name in the predictions, for the report; None leaves them out.
        judge: who also judges open answers, if anybody; its verdicts lie in `out/judge.jsonl`.

    Returns:
        The content of `scores.json`.
    """
    rules = find_scorers(scorers)
    table = score_predictions(predictions, rules, group_by=group_by)
    resamples = Resamples(table.clusters, num_resamples=num_resamples)
    scores: dict[str, object] = {"format": FORMAT, **(facts or {}), **summarize(table, resamples)}
    numbers = {row_id: number for number, row_id in enumerate(table.ids)}
    scores["probabilities"] = probability_scores(
        predictions, numbers, resamples, scored_groups(table)
    )
    others = {
        name: score_predictions(read_predictions(path), rules, group_by=group_by)
        for name, path in (baselines or {}).items()
    }
    scores["baselines"] = {
        name: {
            **metric_dicts(other, resamples.intervals(other.values)),
            "num_images_seen": other.num_images_seen,
        }
        for name, other in others.items()
    }
    scores["image_adds"] = {
        name: {"scorers": _difference(table, other, num_resamples)}
        for name, other in others.items()
    }
    if judge is not None:
        scores["judge"] = _judged(table, resamples, predictions, judge, out / "judge.jsonl")
    if leaked is not None:
        scores["leaks"] = _without_leaks(table, resamples, leaked)
    out.mkdir(parents=True, exist_ok=True)
    write_json(out / "scores.json", scores)
    scored = [one for one in predictions if one.truth.strip()]
    write_report(out / "report.html", scores, table, scored, load_image)
    return scores


def _difference(table: ScoreTable, other: ScoreTable, num_resamples: int) -> Mapping[str, object]:
    """What the model has beyond the baseline, row by row."""
    pairs = pair(table, other)
    clusters = np.unique(table.clusters[pairs.rows], return_inverse=True)[1].reshape(-1)
    return paired_differences(pairs, clusters, num_resamples=num_resamples)


def _without_leaks(
    table: ScoreTable, resamples: Resamples, leaked: Sequence[str]
) -> dict[str, object]:
    found = set(leaked)
    rows = np.flatnonzero([row_id not in found for row_id in table.ids]).astype(np.int64)
    found_here = [row_id for row_id in table.ids if row_id in found]
    kept = metric_dicts(table, resamples.intervals(table.values, rows)) if len(rows) else None
    return {"num_leaked": len(found_here), "leaked": found_here, "without_leaked": kept}


def _judged(
    table: ScoreTable,
    resamples: Resamples,
    predictions: Sequence[Prediction],
    judge: Judge,
    path: Path,
) -> dict[str, object]:
    """The share of open answers that the judge calls right; an unreadable verdict is none."""
    verdicts = {one.id: one for one in judge_answers(predictions, judge, path)}
    column = np.full((len(table.ids), 1), np.nan)
    for row, row_id in enumerate(table.ids):
        if row_id in verdicts:
            column[row, 0] = float(verdicts[row_id].is_right is True)
    [interval] = resamples.intervals(column)
    unread = [one.id for one in verdicts.values() if one.is_right is None]
    found = {"open_accuracy": interval.as_dict()} if interval.n else {}
    return {**describe(judge), "metrics": found, "unread": unread}
