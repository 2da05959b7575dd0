"""Closed answers by what was true and what was said: `confusion_tables`."""

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field

from moellava.eval.predictions import Prediction
from moellava.eval.scorers.choices import named_options, option_of_truth
from moellava.eval.scorers.strict import verdict

NEITHER = "neither or both"
_MOST_OPTIONS = 20


@dataclass
class Confusion:
    """Counts of (true, said); `said` is one of the names or `NEITHER`."""

    title: str
    names: tuple[str, ...]
    counts: Counter[tuple[str, str]] = field(default_factory=Counter)


def confusion_tables(predictions: Iterable[Prediction]) -> list[Confusion]:
    """One table for yes and no, and one for each list of options that several questions share."""
    yes_no = Confusion("yes and no", ("yes", "no"))
    by_options: dict[tuple[str, ...], Confusion] = {}
    for prediction in predictions:
        options = prediction.options
        truth = verdict(prediction.truth) if prediction.answer_type == "closed" else None
        if truth is not None:
            yes_no.counts[truth, verdict(prediction.answer) or NEITHER] += 1
        elif 2 <= len(options) <= _MOST_OPTIONS:
            right = option_of_truth(prediction.truth, options)
            if right is not None:
                table = by_options.setdefault(options, Confusion("options", options))
                named = named_options(prediction.answer, options)
                said = options[next(iter(named))] if len(named) == 1 else NEITHER
                table.counts[options[right], said] += 1
    shared = [table for table in by_options.values() if table.counts.total() > 1]
    return [table for table in (yes_no, *shared) if table.counts]
