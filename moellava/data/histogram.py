"""How long the rows are: a histogram as text for the terminal, and as a PNG."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np

BINS = 12
_BAR = 40  # characters of the longest bar


def text_histogram(lengths: Sequence[int], unit: str, *, bins: int = BINS) -> str:
    """One line per bin of lengths: its range, a bar, its count."""
    counts, edges = _binned(lengths, bins)
    width = len(f"{edges[-1]:,}")
    lines = [f"length of a row in {unit} (without image placeholders)"]
    for count, low, high in zip(counts, edges[:-1], edges[1:], strict=True):
        bar = "#" * round(_BAR * count / max(counts)) or ("." if count else "")
        lines.append(f"  {low:>{width},} to {high - 1:>{width},}  {bar:<{_BAR}}  {count:,}")
    return "\n".join(lines)


def save_histogram(
    lengths: Sequence[int], unit: str, title: str, path: Path, *, bins: int = 40
) -> None:
    """The same as a picture."""
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError(
            "The picture needs matplotlib. Type: pip install 'moellava[data]'"
        ) from error
    counts, edges = _binned(lengths, bins)
    figure = Figure(figsize=(7, 3.5), layout="constrained")
    axes = figure.subplots()
    axes.bar(
        edges[:-1],
        counts,
        width=np.diff(edges),
        align="edge",
        color="#4878a8",
        edgecolor="white",
        linewidth=0.4,
    )
    median, longest = int(np.median(lengths)), max(lengths)
    axes.axvline(median, color="#c44e52", linewidth=1.2, label=f"median {median:,}")
    axes.set(
        xlabel=f"{unit} in a row, without image placeholders",
        ylabel="rows",
        xlim=(edges[0], edges[-1]),
    )
    axes.set_title(f"{title}: {len(lengths):,} rows, longest {longest:,}", fontsize=10)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
    figure.savefig(path, dpi=150)


def _binned(lengths: Sequence[int], bins: int) -> tuple[list[int], list[int]]:
    """Counts, and whole-numbered edges of bins of one width."""
    low, high = min(lengths), max(lengths)
    step = max(1, -(-(high - low + 1) // bins))
    edges = list(range(low, high + step + 1, step))
    counts, _ = np.histogram(lengths, bins=edges)
    return counts.tolist(), edges
