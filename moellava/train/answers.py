"""Held-out rows → a model's answers and their scores, by the code of `moellava.eval`.

| name | gives |
|---|---|
| `answer_rows`, `answer_questions` | predictions, in the chat template of the training |
| `first_questions` | what each row asks first |
| `mean_scores` | the metrics of scorers |
| `share_exact` | the share of exact answers |
"""

import copy
from collections.abc import Sequence

import numpy as np
from PIL import Image

from moellava.data.collate import ChatCollator
from moellava.data.rows import Row
from moellava.eval.answering import ask_about, predict
from moellava.eval.asking import Asker
from moellava.eval.metrics import is_exact_answer
from moellava.eval.predictions import Prediction
from moellava.eval.prompts import find_prompt
from moellava.eval.questions import Question, questions_of
from moellava.eval.score_table import score_predictions
from moellava.eval.scorers import find_scorers
from moellava.model.loaded_model import LoadedModel


def answer_rows(
    loaded: LoadedModel,
    rows: Sequence[Row],
    collator: ChatCollator,
    *,
    max_new_tokens: int,
    batch_size: int = 8,
) -> list[Prediction]:
    """Ask what each row asks first, greedily."""
    return answer_questions(
        loaded,
        rows,
        first_questions(list(questions_of(rows)), len(rows)),
        collator,
        max_new_tokens=max_new_tokens,
        batch_size=batch_size,
    )


def answer_questions(
    loaded: LoadedModel,
    rows: Sequence[Row],
    questions: Sequence[Question],
    collator: ChatCollator,
    *,
    max_new_tokens: int,
    batch_size: int = 8,
) -> list[Prediction]:
    """Ask some questions of the rows, greedily; in their order.

    Args:
        questions: of `questions_of(rows)`.
        collator: its chat template writes the prompts, and its `load_image` opens the images.
    """
    places = {
        name: (question.row_number, number)
        for question in questions
        for number, name in enumerate(question.image_names)
    }

    def load(name: str) -> Image.Image:
        row, number = places[name]
        return collator.load_image(rows[row].images[number])

    processor = copy.copy(loaded.processor)
    processor.chat_template = collator.chat_template
    asker = Asker(
        LoadedModel(loaded.model, processor),
        load,
        max_new_tokens=max_new_tokens,
        batch_size=batch_size,
    )
    prompt = find_prompt("none")
    known = {question.id: question for question in questions}
    asked = {row_id: ask_about(question, prompt) for row_id, question in known.items()}
    found = {
        one.id: predict(known[one.id], asked[one.id], one, prompt)
        for batch in asker.ask(list(asked.values()))
        for one in batch
    }
    return [found[question.id] for question in questions]


def first_questions(questions: Sequence[Question], num_rows: int) -> list[Question]:
    """What each of the first rows asks first."""
    first: dict[int, Question] = {}
    for question in questions:
        if question.row_number < num_rows:
            first.setdefault(question.row_number, question)
    return list(first.values())


def mean_scores(predictions: Sequence[Prediction], scorers: Sequence[str]) -> dict[str, float]:
    """`SCORER_METRIC` → the mean over the predictions that the metric applies to, 0..1."""
    table = score_predictions(predictions, find_scorers(scorers))
    return {
        f"{scorer}_{metric}": float(np.nanmean(table.values[:, place]))
        for place, (scorer, metric) in enumerate(table.metrics)
    }


def share_exact(predictions: Sequence[Prediction]) -> float:
    """Share of the answers that are exact, by `moellava.eval.metrics.is_exact_answer`."""
    exact = [is_exact_answer(one.answer, one.truth) for one in predictions]
    return sum(exact) / len(exact)
