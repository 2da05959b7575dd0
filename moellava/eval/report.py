"""Scores and predictions in, one HTML file out that needs no network: `write_report`."""

import base64
import io
import json
from collections.abc import Callable, Mapping, Sequence
from html import escape
from importlib.resources import files
from pathlib import Path
from string import Template

import numpy as np
from PIL import Image

from moellava.eval.predictions import Prediction
from moellava.eval.report_sections import sections, subtitle, warnings
from moellava.eval.score_table import ScoreTable
from moellava.eval.statistics import Floats
from moellava.storage.writing import write_text

MOST_LISTED = 5000  # questions in the list, the worst first
MOST_PICTURES = 2000
_THUMBNAIL = (96, 96)
# What says how good a single answer is: the first that its scorer has for it.
_OF_ONE_ANSWER = (
    "closed_accuracy",
    "choice_accuracy",
    "open_f1",
    "open_exact",
    "accuracy",
    "f1",
)

LoadImage = Callable[[str], Image.Image]


def write_report(
    path: Path,
    scores: Mapping[str, object],
    table: ScoreTable,
    predictions: Sequence[Prediction],
    load_image: LoadImage | None = None,
) -> None:
    """Write the summary, charts, confusion, groups and a list of questions to browse.

    Everything that comes from data or a model is escaped, and the page's policy forbids it to load
    or send anything.

    Args:
        scores: the content of `scores.json`.
        table: the scores of each of the `predictions`, in their order.
        load_image: the picture of a name in the predictions; None for a list without pictures.
    """
    columns = _columns_of_one_answer(table)
    order = _worst_first(table, columns)
    listed = order[:MOST_LISTED]
    names = list(dict.fromkeys(name for row in listed for name in predictions[row].images))
    pictures = {} if load_image is None else _thumbnails(names[:MOST_PICTURES], load_image)
    place = {name: number for number, name in enumerate(pictures)}
    rows = [
        {
            "id": predictions[row].id,
            "question": predictions[row].question,
            "answer": predictions[row].answer,
            "truth": predictions[row].truth,
            "type": predictions[row].answer_type,
            "options": predictions[row].options,
            "groups": {name: str(v[row]) for name, v in table.groups.items() if v[row] is not None},
            "cut": bool(predictions[row].is_cut),
            "pictures": [place[name] for name in predictions[row].images if name in place],
            "scores": [_first_known(table.values[row, at]) for at in columns.values()],
        }
        for row in listed
    ]
    data = {"scorers": list(columns), "pictures": list(pictures.values()), "rows": rows}
    page = Template(files("moellava.eval").joinpath("report_page.html").read_text("utf-8"))
    title = f"Evaluation of {scores.get('checkpoint') or 'predictions'}"
    text = page.substitute(
        title=escape(title),
        subtitle=subtitle(scores),
        warnings=warnings(scores),
        body=sections(scores, predictions),
        listed=escape(_how_many(len(listed), len(order))),
        data=_as_script(data),
    )
    write_text(path, text)


def _columns_of_one_answer(table: ScoreTable) -> dict[str, list[int]]:
    """Scorer → columns; a row's score is the first that is known."""
    found: dict[str, list[int]] = {}
    for metric in _OF_ONE_ANSWER:
        for number, (scorer, name) in enumerate(table.metrics):
            if name == metric:
                found.setdefault(scorer, []).append(number)
    order = {scorer: number for number, (scorer, _) in reversed(list(enumerate(table.metrics)))}
    return dict(sorted(found.items(), key=lambda item: order[item[0]]))


def _worst_first(table: ScoreTable, columns: Mapping[str, Sequence[int]]) -> list[int]:
    """Rows by the score of the first scorer; those that it does not score come last."""
    if not columns:
        return list(range(len(table.ids)))
    first = next(iter(columns.values()))
    scores = [_first_known(table.values[row, first]) for row in range(len(table.ids))]
    order = [2.0 if score is None else score for score in scores]
    return sorted(range(len(order)), key=order.__getitem__)


def _first_known(values: Floats) -> float | None:
    known = values[~np.isnan(values)]
    return round(float(known[0]), 4) if len(known) else None


def _thumbnails(names: Sequence[str], load_image: LoadImage) -> dict[str, str]:
    return {name: _thumbnail(load_image(name)) for name in names}


def _thumbnail(picture: Image.Image) -> str:
    small = picture.convert("RGB")
    small.thumbnail(_THUMBNAIL)
    file = io.BytesIO()
    small.save(file, "JPEG", quality=75)
    return f"data:image/jpeg;base64,{base64.b64encode(file.getvalue()).decode()}"


def _as_script(data: object) -> str:
    """JSON that cannot end its script element."""
    text = json.dumps(data, ensure_ascii=False, allow_nan=False)
    for letter in "<>&\u2028\u2029":
        text = text.replace(letter, f"\\u{ord(letter):04x}")
    return text


def _how_many(num_listed: int, num_rows: int) -> str:
    if num_listed == num_rows:
        return "All questions; wrong answers come first."
    return f"{num_listed:,} of {num_rows:,} questions, those with the lowest scores."
