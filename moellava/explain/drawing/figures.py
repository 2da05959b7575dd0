"""What all figures share: a matplotlib figure without a window, and how it is written.

| name | what it gives |
|---|---|
| `new_figure` | an empty figure |
| `finish` | the figure, also written to a file if there is a path |
"""

from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from matplotlib.figure import Figure

DPI = 110


def new_figure(width: float, height: float) -> "Figure":
    """A figure of so many inches, drawn by Agg, so that it needs no display."""
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError(
            "Pictures need matplotlib. Type: pip install 'moellava[explain]'"
        ) from error
    figure = Figure(figsize=(width, height), layout="constrained", dpi=DPI)
    FigureCanvasAgg(figure)
    return figure


def finish(figure: "Figure", path: Path | str | None) -> "Figure":
    """Write the figure if there is a path, and return it."""
    if path is not None:
        figure.savefig(path, dpi=DPI, bbox_inches="tight", pad_inches=0.1)
    return figure
