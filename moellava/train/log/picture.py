"""A run's log → one PNG: losses, speed, and the load of each expert: `save_picture`."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from moellava.train.log.router_load import KINDS
from moellava.train.stage import LogEntry

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


def save_picture(log: Sequence[LogEntry], path: Path, *, title: str) -> None:
    """Draw the log history of a run; mixtures also get the load of their experts.

    Args:
        log: transformers' log history, as `log.json` holds it.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    steps = [entry for entry in log if "loss" in entry]
    loads = [entry["load"] for entry in steps if "load" in entry]
    figure = Figure(figsize=(12, 9 if loads else 4.2), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(3 if loads else 1, 2, squeeze=False)
    _draw_losses(axes[0, 0], log, steps)
    _draw_speed(axes[0, 1], steps)
    for column, kind in enumerate(KINDS if loads else ()):
        shares = np.array([load[kind] for load in loads])  # (steps, L, E)
        _draw_last_load(figure, axes[1, column], shares, loads[0]["layers"], kind)
        _draw_extremes(
            axes[2, column], [entry["step"] for entry in steps if "load" in entry], shares, kind
        )
    for axis in figure.axes:
        if axis.get_xlabel() == "optimizer step":
            axis.xaxis.set_major_locator(MaxNLocator(integer=True))
    figure.suptitle(title)
    figure.savefig(path, dpi=80)


def _draw_losses(axis: "Axes", log: Sequence[LogEntry], steps: Sequence[LogEntry]) -> None:
    lines: tuple[tuple[Sequence[LogEntry], str, str, dict[str, str]], ...] = (
        (steps, "loss", "training loss", {}),
        (log, "eval_loss", "held-out loss", {"marker": "o"}),
        (
            log,
            "eval_answers_exact",
            "share of exact answers",
            {"marker": "s", "linestyle": "--", "color": "tab:green"},
        ),
        (steps, "aux_loss", "balancing loss (1 is even)", {"color": "tab:gray"}),
    )
    for entries, key, label, style in lines:
        points = [(entry["step"], entry[key]) for entry in entries if key in entry]
        if points:
            axis.plot(*zip(*points, strict=True), label=label, **style)  # type: ignore[arg-type]
    axis.set(xlabel="optimizer step", ylim=(0, None))
    axis.legend()


def _draw_speed(axis: "Axes", steps: Sequence[LogEntry]) -> None:
    axis.plot(
        [entry["step"] for entry in steps],
        [entry.get("tokens_per_second", np.nan) for entry in steps],
    )
    axis.set(xlabel="optimizer step", ylabel="tokens per second", ylim=(0, None))
    peak = max((entry.get("memory_mib", 0) for entry in steps), default=0)
    axis.set_title(f"peak memory {peak:,.0f} MiB", fontsize=10)


def _draw_last_load(
    figure: "Figure", axis: "Axes", shares: NDArray[np.float64], layers: Sequence[int], kind: str
) -> None:
    """Mean over the last tenth of the steps."""
    last = shares[-max(1, len(shares) // 10) :].mean(0)
    image = axis.imshow(last, vmin=0, vmax=1, aspect="auto", cmap="viridis")
    for row, expert in np.ndindex(last.shape):
        color = "white" if last[row, expert] < 0.6 else "black"
        axis.text(
            expert,
            row,
            f"{last[row, expert]:.2f}",
            ha="center",
            va="center",
            color=color,
            fontsize=8,
        )
    axis.set(
        title=f"{kind} tokens: share of each expert, end of the run",
        xlabel="expert",
        ylabel="layer",
        xticks=range(last.shape[1]),
        yticks=range(last.shape[0]),
        yticklabels=layers,
    )
    figure.colorbar(image, ax=axis)


def _draw_extremes(
    axis: "Axes", steps: Sequence[int], shares: NDArray[np.float64], kind: str
) -> None:
    axis.fill_between(
        steps,
        shares.min((1, 2)),
        shares.max((1, 2)),
        alpha=0.3,
        label="least to most loaded expert",
    )
    axis.plot(steps, shares.max(2).mean(1), label="most loaded, mean over layers")
    axis.axhline(1 / shares.shape[2], color="black", linewidth=0.8, linestyle=":", label="even")
    axis.set(
        xlabel="optimizer step", ylabel="share", title=f"{kind} tokens: load over time", ylim=(0, 1)
    )
    axis.legend(fontsize=8)
