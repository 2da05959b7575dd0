"""Predictions → a number per prediction and metric: `ScoreTable`, from `score_predictions`."""

from array import array
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import numpy as np

from moellava.eval.predictions import Prediction
from moellava.eval.scorers.registry import AnswerType, Scorer
from moellava.eval.statistics import Floats, Ints, cluster_numbers
from moellava.messages import first_names, unknown_name

# Answer, truth, answer type and options: all that a score depends on.
_Pair = tuple[str, str, AnswerType, tuple[str, ...]]


@dataclass
class ScoreTable:
    """Scores of N predictions; texts and images are not kept.

    Args:
        metrics: the scorer and the metric of each of the M columns.
        values: (N, M), `nan` where a metric does not apply.
        clusters: (N,) the image of each prediction, as a number.
        groups: group name → the value of each prediction, None where it has none.
        empty_truth: ids of predictions without a truth, which are left out.
    """

    ids: list[str]
    answer_types: list[AnswerType]
    metrics: list[tuple[str, str]]
    values: Floats
    clusters: Ints
    groups: dict[str, list[str | None]]
    answer_type_from: Counter[tuple[str, str]] = field(default_factory=Counter)
    prompts: Counter[str] = field(default_factory=Counter)
    num_images: int = 0
    num_images_seen: int | None = None
    num_cut: int | None = None
    num_empty: int = 0
    num_tokens: int | None = None
    empty_truth: list[str] = field(default_factory=list)

    def rows_of(self, group: str, value: str) -> Ints:
        """Numbers of the predictions with this value of a group."""
        return np.flatnonzero([found == value for found in self.groups[group]]).astype(np.int64)

    def column(self, scorer: str, metric: str) -> Floats:
        """(N,) one metric."""
        return self.values[:, self.metrics.index((scorer, metric))]


def score_predictions(
    predictions: Iterable[Prediction],
    scorers: Sequence[Scorer],
    *,
    group_by: Sequence[str] | None = None,
) -> ScoreTable:
    """Score predictions one after the other; what is kept of each is a row of numbers.

    Args:
        group_by: names of groups; all that the predictions have if left out.

    Raises:
        ValueError: two predictions with one id, no prediction with a truth, or a group that no
            prediction has.
    """
    filler = _Filler(scorers)
    for prediction in predictions:
        filler.add(prediction)
    return filler.table(group_by)


class _Filler:
    def __init__(self, scorers: Sequence[Scorer]):
        self.scorers = scorers
        self.ids: dict[str, None] = {}
        self.answer_types: list[AnswerType] = []
        # Short answers repeat: each distinct one is scored once.
        self.distinct: dict[_Pair, int] = {}
        self.pairs = array("q")
        # Their scores, as entries of a table: numbers, since 100,000 dicts take a gigabyte.
        self.columns: dict[tuple[str, str], int] = {}
        self.entry_columns, self.entry_values = array("q"), array("d")
        self.entry_ends = array("q")  # of each distinct pair
        self.columns_of: dict[tuple[str, ...], array[int]] = {}  # by a scorer and what it gave
        self.images: list[tuple[int, ...]] = []
        self.image_numbers: dict[str, int] = {}
        self.groups: dict[str, list[str | None]] = {}
        self.repeated: list[str] = []
        self.empty_truth: list[str] = []
        self.answer_type_from: Counter[tuple[str, str]] = Counter()
        self.prompts: Counter[str] = Counter()
        self.num_empty = 0
        self.counts: dict[str, int | None] = {"cut": None, "seen": None, "tokens": None}

    def add(self, prediction: Prediction) -> None:
        if prediction.id in self.ids:
            self.repeated.append(prediction.id)
            return
        if not prediction.truth.strip():
            self.empty_truth.append(prediction.id)
            return
        row = len(self.ids)
        self.ids[prediction.id] = None
        self.answer_types.append(prediction.answer_type)
        self.answer_type_from[prediction.answer_type, prediction.answer_type_from] += 1
        self.prompts[prediction.prompt] += 1
        self.num_empty += not prediction.answer.strip()
        self._count("cut", prediction.is_cut)
        self._count("seen", prediction.num_images_seen)
        self._count("tokens", prediction.num_tokens)
        numbers = self.image_numbers
        self.images.append(
            tuple(numbers.setdefault(name, len(numbers)) for name in prediction.images)
        )
        for name, value in prediction.groups.items():
            known = self.groups.setdefault(name, [])
            known.extend([None] * (row - len(known)))
            known.append(value)
        pair = (prediction.answer, prediction.truth, prediction.answer_type, prediction.options)
        number = self.distinct.get(pair)
        if number is None:
            number = self.distinct[pair] = len(self.distinct)
            self._score(pair)
        self.pairs.append(number)

    def _score(self, pair: _Pair) -> None:
        answer, truth, answer_type, options = pair
        for scorer in self.scorers:
            scored = scorer.score(answer, truth, answer_type=answer_type, options=options)
            key = (scorer.name, *scored)
            columns = self.columns_of.get(key)
            if columns is None:
                columns = self.columns_of[key] = self._columns(scorer.name, scored)
            self.entry_columns.extend(columns)
            self.entry_values.extend(scored.values())
        self.entry_ends.append(len(self.entry_values))

    def _columns(self, scorer: str, metrics: Iterable[str]) -> "array[int]":
        known = self.columns
        return array("q", [known.setdefault((scorer, one), len(known)) for one in metrics])

    def _distinct_values(self, metrics: Sequence[tuple[str, str]]) -> Floats:
        """(distinct pairs, M) scores, `nan` where a metric does not apply."""
        found = np.full((len(self.distinct), len(metrics)), np.nan)
        place = np.empty(len(metrics), dtype=np.int64)  # of each column among the metrics
        place[[self.columns[metric] for metric in metrics]] = np.arange(len(metrics))
        if self.entry_values:
            ends = np.frombuffer(self.entry_ends, np.int64)
            rows = np.searchsorted(ends, np.arange(len(self.entry_values)), side="right")
            columns = place[np.frombuffer(self.entry_columns, np.int64)]
            found[rows, columns] = np.frombuffer(self.entry_values, np.float64)
        return found

    def _count(self, name: str, value: int | bool | None) -> None:
        if value is not None:
            self.counts[name] = (self.counts[name] or 0) + int(value)

    def table(self, group_by: Sequence[str] | None) -> ScoreTable:
        if self.repeated:
            raise ValueError(
                f"{len(self.repeated)} predictions have the id of another: "
                f"{first_names(self.repeated)}. Give each row one prediction."
            )
        if not self.ids:
            without = f" ({len(self.empty_truth)} have an empty truth)" if self.empty_truth else ""
            raise ValueError(f"There is no prediction to score{without}.")
        num_rows = len(self.ids)
        metrics = _in_order(self.columns, self.scorers)
        distinct = self._distinct_values(metrics)
        for known in self.groups.values():
            known.extend([None] * (num_rows - len(known)))
        for name in group_by or ():
            if name not in self.groups:
                raise unknown_name("group", name, self.groups)
        wanted = self.groups if group_by is None else {name: self.groups[name] for name in group_by}
        return ScoreTable(
            ids=list(self.ids),
            answer_types=self.answer_types,
            metrics=metrics,
            values=distinct[np.frombuffer(self.pairs, dtype=np.int64)],
            clusters=cluster_numbers(self.images),
            groups=wanted,
            answer_type_from=self.answer_type_from,
            prompts=self.prompts,
            num_images=len(self.image_numbers),
            num_images_seen=self.counts["seen"],
            num_cut=self.counts["cut"],
            num_empty=self.num_empty,
            num_tokens=self.counts["tokens"],
            empty_truth=self.empty_truth,
        )


def _in_order(
    metrics: Iterable[tuple[str, str]], scorers: Sequence[Scorer]
) -> list[tuple[str, str]]:
    """The metrics that occur, those of one scorer together."""
    order = {scorer.name: number for number, scorer in enumerate(scorers)}
    return sorted(metrics, key=lambda metric: order[metric[0]])
