"""`results.json` as Markdown tables, for the terminal and for a paper: `results_table`."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

Json = Mapping[str, Any]


def results_table(results: Json) -> str:
    """The chosen metrics of all variants with intervals, their differences, what the image adds."""
    seeds, variants = results["seeds"], results["variants"]
    parts = [
        f"# {results['name']}",
        f"{results['num_questions']:,} questions about {results['num_images']:,} images, "
        f"{len(seeds)} seeds ({', '.join(map(str, seeds))}); in percent, with 95 % intervals by "
        f"{results['intervals']['method']}, {results['intervals']['num_resamples']:,} resamples.",
        _table(["metric", "asked", *variants], _scores(results)),
    ]
    if results["differences"]:
        head = ["metric", "difference", "value", "over seeds and images", "t over seeds", "p"]
        parts += ["Paired differences:", _table(head, _differences(results))]
    adds = list(_image_adds(results))
    if adds:
        head = ["metric", "variant", "baseline", "the image adds", "over seeds and images"]
        parts += ["What the image adds:", _table(head, adds)]
    head = ["variant", "stage", "steps", "rows", "trained", "parameters", "active per token"]
    parts += ["Models:", _table(head, _models(variants))]
    return "\n\n".join(parts) + "\n"


def entry_of(scorers: Json, metric: str) -> Json | None:
    """The entry of `scorer.metric`; None if it has none."""
    scorer, _, name = metric.partition(".")
    entry: Json | None = scorers.get(scorer, {"metrics": {}})["metrics"].get(name)
    return entry


def _scores(results: Json) -> Iterator[list[str]]:
    variants = results["variants"]
    baselines = next(iter(variants.values()))["baselines"]
    for metric in results["metrics"]:
        own = [entry_of(one["scorers"], metric) for one in variants.values()]
        yield [metric, "as it is", *map(_with_interval, own)]
        for baseline in baselines:
            found = [
                entry_of(one["baselines"][baseline]["scorers"], metric) for one in variants.values()
            ]
            yield [metric, baseline, *map(_with_interval, found)]


def _differences(results: Json) -> Iterator[list[str]]:
    for pair in results["differences"]:
        for metric in results["metrics"]:
            entry = entry_of(pair["scorers"], metric)
            if entry is None:
                continue
            name = f"{pair['first']} − {pair['second']}"
            test = ["", ""]
            if "p_value" in entry:
                test = [f"{_signed(entry['t_low'])} to {_signed(entry['t_high'])}"]
                test.append(f"{entry['p_value']:.2g}")
            yield [metric, name, _signed(entry["value"]), _signed_interval(entry), *test]


def _image_adds(results: Json) -> Iterator[list[str]]:
    for metric in results["metrics"]:
        for variant, one in results["variants"].items():
            for baseline, found in one["image_adds"].items():
                entry = entry_of(found["scorers"], metric)
                if entry is not None:
                    value = _signed(entry["value"])
                    yield [metric, variant, baseline, value, _signed_interval(entry)]


def _models(variants: Json) -> Iterator[list[str]]:
    for variant, one in variants.items():
        for stage, facts in one["model"].items():
            keys = ("num_steps", "num_rows", "num_trained", "num_parameters", "num_active")
            yield [variant, stage, *(f"{facts[key]:,}" for key in keys)]


def _with_interval(entry: Json | None) -> str:
    if entry is None:
        return ""
    return f"{100 * entry['value']:.1f} ({100 * entry['low']:.1f} to {100 * entry['high']:.1f})"


def _signed_interval(entry: Json) -> str:
    return f"{_signed(entry['low'])} to {_signed(entry['high'])}"


def _signed(share: float) -> str:
    return f"{100 * share:+.1f}"


def _table(head: Sequence[str], rows: Iterator[list[str]] | Sequence[list[str]]) -> str:
    lines = [list(head), *rows]
    widths = [max(len(line[column]) for line in lines) for column in range(len(head))]
    padded = [
        "| "
        + " | ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True))
        + " |"
        for line in lines
    ]
    rule = "|" + "|".join("-" * (width + 2) for width in widths) + "|"
    return "\n".join([padded[0], rule, *padded[1:]])
