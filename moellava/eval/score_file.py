"""A file of anybody's predictions → scores: `score_file`, without a model and without torch."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from moellava.eval.judge import Judge
from moellava.eval.predictions import Prediction, read_answers
from moellava.eval.results import write_results
from moellava.eval.score_table import ScoreTable, score_predictions
from moellava.eval.scorers import find_scorers
from moellava.eval.statistics import NUM_RESAMPLES
from moellava.storage.writing import replacing

if TYPE_CHECKING:  # the data's modules load torch; a file with truths needs none of them
    from moellava.eval.questions import Question


@dataclass
class Join:
    """Which rows of the data and which predictions found each other.

    Args:
        without_row: ids of predictions that no row has; they are not scored.
        without_prediction: ids of rows that nobody answered; they are not scored either.
    """

    without_row: list[str] = field(default_factory=list)
    without_prediction: list[str] = field(default_factory=list)

    def as_dict(self) -> dict[str, list[str]]:
        return {"without_row": self.without_row, "without_prediction": self.without_prediction}


def score_file(
    path: str | Path,
    *,
    questions: "Iterable[Question] | None" = None,
    keys: Mapping[str, str] | None = None,
    scorers: Sequence[str] = (),
    group_by: Sequence[str] | None = None,
) -> tuple[ScoreTable, Join]:
    """Score the predictions of a file.

    Args:
        path: see `moellava.eval.predictions.read_answers`.
        questions: the data that was asked, for files without truths; what it says of a question
            counts more than what the file says.
        keys: field of `Prediction` → key of the file.
        scorers: names; all if empty.
        group_by: names of groups; all if left out.

    Raises:
        ValueError: a prediction without a truth, two for one row, an unknown scorer or group, or
            nothing to score.
    """
    rules = find_scorers(scorers)
    join = Join()
    predictions = join_predictions(path, questions, keys, join)
    table = score_predictions(predictions, rules, group_by=group_by)
    return table, join


def write_scores(
    path: str | Path,
    out: Path,
    *,
    questions: "Iterable[Question] | None" = None,
    keys: Mapping[str, str] | None = None,
    scorers: Sequence[str] = (),
    group_by: Sequence[str] | None = None,
    num_resamples: int = NUM_RESAMPLES,
    judge: Judge | None = None,
) -> dict[str, object]:
    """As `score_file`, and write `predictions.jsonl` (our layout), `scores.json`, `report.html`.

    Returns:
        The content of `scores.json`.
    """
    join = Join()
    out.mkdir(parents=True, exist_ok=True)
    predictions = list(join_predictions(path, questions, keys, join))
    with replacing(out / "predictions.jsonl") as part, part.open("w", encoding="utf-8") as file:
        file.writelines(f"{prediction.as_line()}\n" for prediction in predictions)
    return write_results(
        out,
        predictions,
        scorers=scorers,
        group_by=group_by,
        num_resamples=num_resamples,
        facts={"predictions": str(path), "join": join.as_dict()},
        judge=judge,
    )


def join_predictions(
    path: str | Path,
    questions: "Iterable[Question] | None",
    keys: Mapping[str, str] | None,
    join: Join,
) -> Iterator[Prediction]:
    """The predictions of a file beside what the data says; fills `join` as it goes."""
    if questions is None:
        yield from (answer.joined({}) for answer in read_answers(path, keys))
        return
    known = {question.id: _known(question) for question in questions}
    answered = set()
    for answer in read_answers(path, keys):
        if answer.id in known:
            answered.add(answer.id)
            yield answer.joined(known[answer.id])
        else:
            join.without_row.append(answer.id)
    join.without_prediction += [row_id for row_id in known if row_id not in answered]


def _known(question: "Question") -> dict[str, object]:
    """What the data says about a question; its images only by name."""
    return {
        "truth": question.truth,
        "question": question.text,
        "images": question.image_names,
        "answer_type": question.answer_type,
        "answer_type_from": question.answer_type_from,
        "options": question.options,
        "groups": question.groups,
    }
