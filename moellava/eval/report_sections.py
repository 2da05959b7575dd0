"""The parts of the report above its list, as escaped HTML: `sections`, `warnings`, `subtitle`."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from html import escape
from typing import Any

from moellava.eval.charts import Bar, bars, reliability
from moellava.eval.confusion import NEITHER, Confusion, confusion_tables
from moellava.eval.predictions import Prediction
from moellava.eval.scorers import SCORERS

# A JSON object of scores.json.
Json = Mapping[str, Any]

_MAIN = (
    "accuracy",
    "closed_accuracy",
    "choice_accuracy",
    "open_recall",
    "open_exact",
    "open_f1",
    "f1",
)


def subtitle(scores: Json) -> str:
    """How many questions and images, under which prompts."""
    images = scores["num_images"]
    parts = [f"{scores['num_questions']:,} questions about {images:,} images"]
    if scores.get("num_images_seen") is not None:
        parts.append(f"{scores['num_images_seen']:,} images given to the model")
    parts.append("prompt " + ", ".join(repr(name) for name in scores["prompts"]))
    for answer_type, ways in scores["answer_types"].items():
        told = ", ".join(f"{count:,} by {way}" for way, count in ways.items())
        parts.append(f"{answer_type}: {told}")
    if scores.get("data"):
        parts.insert(0, str(scores["data"]))
    return escape("; ".join(parts))


def warnings(scores: Json) -> str:
    """What a reader of the numbers has to know."""
    told: list[str] = []
    if scores["cut_answers"]:
        told.append(
            f"{scores['cut_answers']:,} answers reached the most new tokens before they ended."
        )
    if scores["empty_answers"]:
        told.append(f"{scores['empty_answers']:,} answers are empty.")
    if scores["empty_truth"]:
        told.append(f"{len(scores['empty_truth']):,} predictions have no truth: not scored.")
    if scores["uses_gold_type"]:
        told.append("The prompt uses the gold answer's type, which tells the model about it.")
    for name, count in scores["groups_not_scored"].items():
        told.append(f"The group {name!r} has {count:,} values: it is not scored by value.")
    join = scores.get("join") or {}
    if join.get("without_row"):
        told.append(
            f"{len(join['without_row']):,} predictions have no row in the data: not scored."
        )
    if join.get("without_prediction"):
        told.append(f"{len(join['without_prediction']):,} rows have no prediction: not scored.")
    if scores.get("leaks"):
        told.append(
            f"{scores['leaks']['num_leaked']:,} questions are about images of the training set."
        )
    return "".join(f'<p class="warning">{escape(text)}</p>' for text in told)


def sections(scores: Json, predictions: Iterable[Prediction]) -> str:
    """Scores with intervals, what the image adds, groups, confusion, probabilities, settings."""
    parts = ["<h2>Scores</h2>", _charts(scores["scorers"]), _all_metrics(scores["scorers"])]
    if scores.get("baselines"):
        parts += ["<h2>What the image adds</h2>", _image_adds(scores)]
    if scores.get("leaks") and scores["leaks"]["without_leaked"]:
        parts += ["<h2>Without leaked images</h2>"]
        parts += [_all_metrics(scores["leaks"]["without_leaked"]["scorers"])]
    for group, values in scores["groups"].items():
        parts += [f"<h2>By {escape(group)}</h2>", _group(values)]
    tables = confusion_tables(predictions)
    if tables:
        parts += ["<h2>Closed answers</h2>", *map(_confusion, tables)]
    if scores.get("probabilities"):
        parts += ["<h2>Probabilities</h2>", _probabilities(scores["probabilities"])]
    return "".join([*parts, "<h2>Settings</h2>", _settings(scores)])


def _charts(scorers: Json) -> str:
    entries = [
        _bar(f"{scorer}: {metric}", entry["metrics"][metric])
        for scorer, entry in scorers.items()
        for metric in _MAIN
        if metric in entry["metrics"]
    ]
    return f'<div class="scroll">{bars(entries, "scores")}</div>'


def _bar(label: str, metric: Json) -> Bar:
    return Bar(label, metric["value"], metric["low"], metric["high"], f", n={metric['n']}")


def _all_metrics(scorers: Json) -> str:
    rows = []
    for scorer, entry in scorers.items():
        for metric, found in entry["metrics"].items():
            rows.append([f"{scorer} {entry['version']}", metric, *_numbers(found)])
    notes = "".join(
        f"<li><b>{escape(name)}</b>: {escape(SCORERS[name].summary)}</li>"
        for name in scorers
        if name in SCORERS
    )
    head = ["scorer", "metric", "value", "95 % interval", "n"]
    return f"<details><summary>All metrics</summary>{_table(head, rows)}<ul>{notes}</ul></details>"


def _numbers(found: Json) -> list[str]:
    return [f"{100 * found['value']:.1f}", _range(found), f"{found['n']:,}"]


def _range(found: Json, scale: float = 100, digits: int = 1) -> str:
    return f"{scale * found['low']:.{digits}f} to {scale * found['high']:.{digits}f}"


def _image_adds(scores: Json) -> str:
    """A table for each scorer, the first one open."""
    head = ["metric", "baseline", "model", "baseline", "adds", "95 % interval", "McNemar p"]
    parts: list[str] = []
    for scorer in scores["scorers"]:
        rows = [row for metric in _MAIN for row in _adds_of(scores, scorer, metric)]
        if rows:
            parts.append(f"<details{'' if parts else ' open'}><summary>{escape(scorer)}</summary>")
            parts.append(f"{_table(head, rows)}</details>")
    if "most_frequent" in scores["baselines"] and scores.get("most_frequent_from"):
        source = escape(str(scores["most_frequent_from"]))
        parts.append(f'<p class="soft">The most frequent answers are those of {source}.</p>')
    return "".join(parts)


def _adds_of(scores: Json, scorer: str, metric: str) -> Iterator[list[str]]:
    """A row for each baseline that has the metric."""
    for name, adds in scores["image_adds"].items():
        found = adds["scorers"].get(scorer, {"metrics": {}})["metrics"].get(metric)
        if found is None:
            continue
        own = scores["scorers"][scorer]["metrics"][metric]["value"]
        other = scores["baselines"][name]["scorers"][scorer]["metrics"][metric]["value"]
        p = f"{found['mcnemar_p']:.3g}" if "mcnemar_p" in found else ""
        shares = [f"{100 * own:.1f}", f"{100 * other:.1f}"]
        yield [metric, name, *shares, *_numbers(found)[:2], p]


def _group(values: Json) -> str:
    parts: list[str] = []
    first = next(iter(values.values()))["scorers"]
    for scorer in first:
        metric = next((name for name in _MAIN if name in first[scorer]["metrics"]), None)
        if metric is None:
            continue
        entries = [
            _bar(value, found["scorers"][scorer]["metrics"][metric])
            for value, found in values.items()
            if metric in found["scorers"].get(scorer, {"metrics": {}})["metrics"]
        ]
        title = f"{scorer}: {metric}"
        parts.append(f"<details{'' if parts else ' open'}><summary>{escape(title)}</summary>")
        parts.append(f'<div class="scroll">{bars(entries, title)}</div></details>')
    return "".join(parts)


def _confusion(table: Confusion) -> str:
    said = [*table.names, NEITHER]
    rows = [
        [f"true: {true}", *(f"{table.counts[true, name]:,}" for name in said)]
        for true in table.names
    ]
    return f"<h3>{escape(table.title)}</h3>{_table(['', *(f'said: {n}' for n in said)], rows)}"


def _probabilities(found: Json) -> str:
    rows = []
    named = [("all", found["all"])] + [
        (f"{group}: {value}", scores)
        for group, values in found["groups"].items()
        for value, scores in values.items()
    ]
    for name, scores in named:
        area = ["", ""]
        if scores["auroc"] is not None:
            area = [f"{scores['auroc']['value']:.3f}", _range(scores["auroc"], 1, 3)]
        accuracy = f"{100 * scores['accuracy']['value']:.1f}"
        error = f"{scores['ece']:.3f}"
        rows.append([name, f"{scores['n']:,}", accuracy, _range(scores["accuracy"]), *area, error])
    note = (
        "The most probable of the stated options (or of yes and no) at the first position of the "
        f"answer; the calibration error is over {found['all']['num_bins']} bins of equal width."
    )
    interval = "95 % interval"
    head = ["", "n", "accuracy", interval, "AUROC of yes", interval, "calibration error"]
    pictures = "".join(_reliability(name, scores["bins"]) for name, scores in named)
    return (
        f'<p class="soft">{escape(note)}</p>{_table(head, rows)}'
        f'<div class="pictures-row">{pictures}</div>'
    )


def _reliability(name: str, bins: Sequence[Json]) -> str:
    entries = [(one["confidence"], one["accuracy"], one["count"]) for one in bins]
    return f"<figure>{reliability(entries, name)}<figcaption>{escape(name)}</figcaption></figure>"


def _settings(scores: Json) -> str:
    shown = ("split", "fingerprints", "decoding", "versions", "intervals")
    rows = [
        [name if not isinstance(scores[name], Mapping) else f"{name}: {key}", str(value)]
        for name in shown
        if scores.get(name)
        for key, value in (
            scores[name].items() if isinstance(scores[name], Mapping) else [("", scores[name])]
        )
    ]
    return _table(["", ""], rows, has_numbers=False)


def _table(head: Sequence[str], rows: Sequence[Sequence[str]], *, has_numbers: bool = True) -> str:
    """If it has numbers, cells that begin with a digit are some, and stand right."""
    top = "".join(f"<th>{escape(cell)}</th>" for cell in head)
    body = "".join(f"<tr>{''.join(_cell(text, has_numbers) for text in row)}</tr>" for row in rows)
    return f'<div class="scroll"><table><tr>{top}</tr>{body}</table></div>'


def _cell(text: str, may_be_number: bool) -> str:
    is_number = may_be_number and (text[:1].isdigit() or text.startswith("-"))
    kind = ' class="number"' if is_number else ""
    return f"<td{kind}>{escape(text)}</td>"
