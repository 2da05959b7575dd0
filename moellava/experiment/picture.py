"""`results.json` → one PNG: seeds, means with intervals, differences: `save_picture`."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from moellava.experiment.results import Json
from moellava.experiment.table import entry_of

if TYPE_CHECKING:
    from matplotlib.axes import Axes


def save_picture(results: Json, path: Path) -> None:
    """Draw a row for each chosen metric: scores to the left, paired differences to the right."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    metrics = results["metrics"]
    num_lines = max(len(_scores(results, metrics[0])), len(_differences(results, metrics[0])), 3)
    figure = Figure(figsize=(11, 0.42 * num_lines * len(metrics) + 1.6), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(len(metrics), 2, squeeze=False)
    for row, metric in enumerate(metrics):
        _draw(axes[row, 0], _scores(results, metric))
        axes[row, 0].set_xlabel(f"{metric}, %")
        _draw(axes[row, 1], _differences(results, metric))
        axes[row, 1].axvline(0, color="black", linewidth=0.8, linestyle=":")
        axes[row, 1].set_xlabel(f"difference of {metric}, points")
    count = f"{len(results['seeds'])} seeds, {results['num_questions']:,} questions about "
    figure.suptitle(
        f"{results['name']}: {count}{results['num_images']:,} images\n"
        "dots: seeds; bars: 95 % over seeds and images",
        fontsize=10,
    )
    figure.savefig(path, dpi=80, format="png")


def _scores(results: Json, metric: str) -> list[tuple[str, Json]]:
    found = []
    for variant, one in results["variants"].items():
        found.append((variant, entry_of(one["scorers"], metric)))
        for baseline, scores in one["baselines"].items():
            found.append((f"{variant}, {baseline}", entry_of(scores["scorers"], metric)))
    return [(label, dict(entry)) for label, entry in found if entry is not None]


def _differences(results: Json, metric: str) -> list[tuple[str, Json]]:
    found = [
        (f"{pair['first']} − {pair['second']}", entry_of(pair["scorers"], metric))
        for pair in results["differences"]
    ]
    for variant, one in results["variants"].items():
        for baseline, adds in one["image_adds"].items():
            found.append((f"{variant} − its {baseline}", entry_of(adds["scorers"], metric)))
    return [(label, dict(entry)) for label, entry in found if entry is not None]


def _draw(axis: "Axes", entries: Sequence[tuple[str, Json]]) -> None:
    """The first entry on top."""
    for place, (_, entry) in enumerate(entries):
        value, low, high = (100 * entry[key] for key in ("value", "low", "high"))
        axis.plot([low, high], [place, place], color="tab:blue", linewidth=5, alpha=0.35)
        seeds = [100 * one for one in entry["by_seed"]]
        axis.plot(seeds, [place] * len(seeds), "o", color="tab:gray", markersize=4, alpha=0.7)
        axis.plot([value], [place], "|", color="tab:blue", markersize=14, markeredgewidth=2.5)
    axis.set_yticks(range(len(entries)), [label for label, _ in entries])
    axis.set_ylim(len(entries) - 0.4, -0.6)
    axis.grid(axis="x", alpha=0.3)
