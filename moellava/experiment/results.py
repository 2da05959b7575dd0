"""The predictions of all runs → one `results.json`: means with intervals, paired differences.

`summarize_runs` gives

    variants -> NAME -> {model, scorers, baselines -> NAME, image_adds -> NAME}
    differences -> [{first, second, scorers}]

where `scorers` is `SCORER -> {version, metrics -> METRIC -> {value, low, high, n, by_seed}}`, all
values in 0..1. What is a difference also has `t_low`, `t_high` and `p_value`, of Student's t over
the seeds, if there are two or more.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from moellava.eval.predictions import read_predictions
from moellava.eval.score_table import ScoreTable, score_predictions
from moellava.eval.scorers import SCORERS, find_scorers
from moellava.eval.statistics import LEVEL, Floats, Ints
from moellava.experiment.check import Checked
from moellava.experiment.options import Experiment
from moellava.experiment.runs import Run
from moellava.experiment.uncertainty import crossed_interval, t_test_over_seeds

FORMAT = 1
METHOD = "percentile bootstrap over seeds and images, drawn independently (crossed)"
Json = dict[str, Any]


@dataclass(frozen=True)
class Answers:
    """The scores of a variant's runs.

    Args:
        metrics: M scorers and metrics.
        values: (S, N, M), `nan` where a metric does not apply.
        clusters: (N,) the image of each question.
    """

    metrics: list[tuple[str, str]]
    values: Floats
    clusters: Ints


def summarize_runs(experiment: Experiment, runs: Sequence[Run], checked: Checked) -> Json:
    """Read the predictions of all runs; the content of `results.json`."""
    options = experiment.evaluation
    own = {name: read_answers(experiment, runs, name) for name in experiment.variants}
    variants: Json = {}
    for name, answers in own.items():
        others = {
            baseline: read_answers(experiment, runs, name, baseline)
            for baseline in options.baselines
        }
        variants[name] = {
            "model": {stage: asdict(facts) for stage, facts in checked.stages[name].items()},
            "scorers": _means(answers, options.num_resamples),
            "baselines": {
                baseline: {"scorers": _means(other, options.num_resamples)}
                for baseline, other in others.items()
            },
            "image_adds": {
                baseline: {"scorers": _differences(answers, other, options.num_resamples)}
                for baseline, other in others.items()
            },
        }
    first, *rest = experiment.variants
    return {
        "format": FORMAT,
        "name": experiment.name,
        "seeds": list(experiment.seeds),
        "data": options.data,
        "num_questions": checked.num_questions,
        "num_images": checked.num_images,
        "metrics": list(options.metrics),
        "intervals": {"level": LEVEL, "method": METHOD, "num_resamples": options.num_resamples},
        "variants": variants,
        "differences": [
            {
                "first": name,
                "second": first,
                "scorers": _differences(own[name], own[first], options.num_resamples),
            }
            for name in rest
        ],
    }


def read_answers(
    experiment: Experiment, runs: Sequence[Run], variant: str, baseline: str | None = None
) -> Answers:
    """The scored answers of a variant's runs, or of a baseline, seed by seed."""
    scorers = find_scorers(experiment.evaluation.scorers)
    file = "predictions.jsonl" if baseline is None else f"baselines/{baseline}.jsonl"
    tables = [
        score_predictions(read_predictions(run.evaluation_folder / file), scorers)
        for run in runs
        if run.variant == variant
    ]
    metrics = list(dict.fromkeys(metric for table in tables for metric in table.metrics))
    return Answers(
        metrics=metrics,
        values=np.stack([_columns(table, metrics) for table in tables]),
        clusters=tables[0].clusters,
    )


def _columns(table: ScoreTable, metrics: Sequence[tuple[str, str]]) -> Floats:
    """(N, M) the table's columns in this order; `nan` for a metric that it lacks."""
    columns = np.full((len(table.ids), len(metrics)), np.nan)
    for place, metric in enumerate(metrics):
        if metric in table.metrics:
            columns[:, place] = table.column(*metric)
    return columns


def _means(answers: Answers, num_resamples: int) -> Json:
    found: Json = {}
    for place, (scorer, metric) in enumerate(answers.metrics):
        _put(found, scorer, metric, _entry(answers.values[..., place], answers, num_resamples))
    return found


def _differences(first: Answers, second: Answers, num_resamples: int) -> Json:
    """First minus second, answer by answer, for the metrics that both have."""
    found: Json = {}
    for place, (scorer, metric) in enumerate(first.metrics):
        if (scorer, metric) not in second.metrics:
            continue
        other = second.values[..., second.metrics.index((scorer, metric))]
        entry = _entry(first.values[..., place] - other, first, num_resamples)
        test = t_test_over_seeds(np.array(entry["by_seed"]))
        if test is not None:
            entry |= {"t_low": test.low, "t_high": test.high, "p_value": test.p_value}
        _put(found, scorer, metric, entry)
    return found


def _entry(values: Floats, answers: Answers, num_resamples: int) -> Json:
    interval = crossed_interval(values, answers.clusters, num_resamples=num_resamples)
    return {**interval.as_dict(), "by_seed": np.nanmean(values, axis=1).tolist()}


def _put(found: Json, scorer: str, metric: str, entry: Mapping[str, object]) -> None:
    of_scorer = found.setdefault(scorer, {"version": SCORERS[scorer].version, "metrics": {}})
    of_scorer["metrics"][metric] = dict(entry)
