"""Routes of tokens → figures of the experts' load and of the paths between them.

| name | what it gives |
|---|---|
| `draw_load` | share and count of each expert, per layer and phase, with the even line |
| `draw_pathways` | flows from the experts of one sparse layer to those of the next |
| `draw_group_load` | load with intervals, for groups of a data set |
| `draw_coactivation` | which experts are chosen together |
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from moellava.explain.drawing.figures import finish, new_figure
from moellava.explain.routing import PHASES, Routing

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Array = npt.NDArray[np.float32]

# Okabe and Ito's colours, which people with colour-blind eyes can tell apart.
EXPERT_COLOURS = (
    *("#0072b2", "#e69f00", "#009e73", "#cc79a7", "#56b4e9", "#d55e00", "#f0e442", "#999999"),
)


def draw_load(routing: Routing, *, path: Path | str | None = None) -> "Figure":
    """One panel per phase: for each sparse layer, the share of its assignments to each expert."""
    num_layers, num_experts = len(routing.layers), routing.num_experts
    figure = new_figure(np.clip(2.2 + 0.32 * num_layers * num_experts, 6.5, 16.0), 6.6)
    panels = figure.subplots(len(PHASES), 1, sharex=True, sharey=True)
    width = 0.84 / num_experts
    show_counts = num_layers * num_experts <= 64
    loads = [routing.load(phase) for phase in PHASES]
    top = min(1.0, 1.18 * max(float(load.max()) for load in loads))
    for axes, phase, load in zip(panels, PHASES, loads, strict=True):
        counts, num_tokens = routing.counts(phase), int(routing.is_phase(phase).sum())
        for expert in range(num_experts):
            x = np.arange(num_layers) + (expert - (num_experts - 1) / 2) * width
            axes.bar(x, load[:, expert], width * 0.92, color=_colour(expert), label=str(expert))
            for place, share, count in zip(x, load[:, expert], counts[:, expert], strict=True):
                if show_counts and count:
                    axes.text(
                        place, share, str(count), ha="center", va="bottom", fontsize=6.5,
                        bbox={"facecolor": "white", "linewidth": 0, "pad": 0.4},
                    )  # fmt: skip
        axes.axhline(1 / num_experts, color="black", linewidth=1, linestyle=":")
        axes.set_title(_phase_title(phase, num_tokens), fontsize=9, loc="left")
        axes.set(ylabel="share", ylim=(0, top))
        axes.margins(x=0.01)
    panels[-1].set(xlabel="sparse layer", xticks=range(num_layers), xticklabels=routing.layers)
    _legend(figure, panels[0], num_experts)
    k = routing.experts.shape[-1]
    figure.suptitle(
        f"Load of the experts: each token goes to {k} of {num_experts}; dotted: even", fontsize=11
    )
    return finish(figure, path)


def draw_pathways(routing: Routing, *, path: Path | str | None = None) -> "Figure":
    """One panel per phase: experts as dots, bands as wide as the weight that takes them."""
    num_layers, num_experts = len(routing.layers), routing.num_experts
    figure = new_figure(np.clip(2.5 + 0.95 * num_layers, 6.5, 16.0), 7.2)
    panels = figure.subplots(len(PHASES), 1, sharex=True)
    for axes, phase in zip(panels, PHASES, strict=True):
        num_tokens = int(routing.is_phase(phase).sum())
        mass = routing.spread()[:, routing.is_phase(phase)].mean(1) if num_tokens else None
        _draw_flows(axes, routing.flows(phase), num_experts)
        for layer in range(num_layers if mass is not None else 0):
            assert mass is not None
            axes.scatter(
                np.full(num_experts, layer),
                np.arange(num_experts),
                s=12 + 420 * mass[layer],
                c=[_colour(expert) for expert in range(num_experts)],
                edgecolors="white",
                linewidths=0.8,
                zorder=3,
            )
        axes.set_title(_phase_title(phase, num_tokens), fontsize=9, loc="left")
        axes.set(ylabel="expert", ylim=(num_experts - 0.4, -0.6), yticks=range(num_experts))
        axes.set_xlim(-0.4, num_layers - 0.6)
        for side in ("top", "right", "left", "bottom"):
            axes.spines[side].set_visible(False)
    panels[-1].set(xlabel="sparse layer", xticks=range(num_layers), xticklabels=routing.layers)
    figure.suptitle(
        "Paths over the sparse layers, all chosen experts by their weights", fontsize=11
    )
    return finish(figure, path)


def _draw_flows(axes: "Axes", flows: Array, num_experts: int) -> None:
    steps = np.linspace(0, 1, 24)
    ease = 3 * steps**2 - 2 * steps**3
    for layer, source, target in np.ndindex(flows.shape):
        share = float(flows[layer, source, target])
        if share < 0.005:
            continue
        middle = source + (target - source) * ease
        half = 0.38 * share
        axes.fill_between(
            layer + steps,
            middle - half,
            middle + half,
            color=_colour(source),
            alpha=0.45,
            linewidth=0,
        )


def draw_group_load(
    layers: Sequence[int],
    loads: Mapping[str, Mapping[str, tuple[Array, Array, Array]]],
    notes: Mapping[str, Sequence[str]],
    *,
    title: str,
    path: Path | str | None = None,
) -> "Figure":
    """One panel per phase and sparse layer: the load of each expert, one mark per group.

    Args:
        loads: phase → group → (S, E) load, lower and upper end of its interval.
        notes: phase → a line above the panel of each sparse layer.
    """
    phases = list(loads)
    groups = list(loads[phases[0]])
    num_experts = loads[phases[0]][groups[0]][0].shape[1]
    columns = len(layers)
    figure = new_figure(np.clip(1.6 + 1.55 * columns, 6.5, 18.0), 1.3 + 2.0 * len(phases))
    panels = figure.subplots(len(phases), columns, sharex=True, sharey=True, squeeze=False)
    for (row, column), axes in np.ndenumerate(panels):
        for number, group in enumerate(groups):
            load, low, high = (part[column] for part in loads[phases[row]][group])
            x = np.arange(num_experts) + (number - (len(groups) - 1) / 2) * 0.8 / len(groups)
            axes.errorbar(
                x,
                load,
                yerr=np.clip(np.stack([load - low, high - load]), 0, None),
                fmt="o",
                markersize=3,
                linewidth=1,
                color=_colour(number),
                label=group,
            )
        axes.axhline(1 / num_experts, color="black", linewidth=0.8, linestyle=":")
        axes.set(xticks=range(num_experts), ylim=(0, None))
        axes.tick_params(labelsize=7)
        axes.set_title(f"layer {layers[column]}\n{notes[phases[row]][column]}", fontsize=7.5)
        if column == 0:
            axes.set_ylabel(f"{phases[row]}\nshare", fontsize=8)
        if row == len(phases) - 1:
            axes.set_xlabel("expert", fontsize=8)
    handles, labels = panels[0, 0].get_legend_handles_labels()
    figure.legend(
        handles, labels, loc="outside lower center", ncols=min(6, len(groups)), fontsize=8,
        frameon=False,
    )  # fmt: skip
    figure.suptitle(title, fontsize=11)
    return finish(figure, path)


def draw_coactivation(
    layers: Sequence[int],
    pairs: Mapping[str, Array],
    *,
    even: float,
    path: Path | str | None = None,
) -> "Figure":
    """One panel per phase and sparse layer: the share of tokens that two experts have in common.

    Args:
        pairs: phase → (S, E, E).
        even: the share of every pair if all pairs were chosen alike.
    """
    phases = list(pairs)
    num_experts = pairs[phases[0]].shape[1]
    shown = {
        phase: np.where(np.eye(num_experts, dtype=bool), np.nan, values)
        for phase, values in pairs.items()
    }
    largest = max(float(np.nanmax(values, initial=0)) for values in shown.values()) or 1.0
    side = 1.55 + 0.12 * max(0, num_experts - 4)
    figure = new_figure(
        np.clip(2.2 + side * len(layers), 6.5, 18.0), 1.1 + (side + 0.35) * len(phases)
    )
    panels = figure.subplots(len(phases), len(layers), sharex=True, sharey=True, squeeze=False)
    for (row, column), axes in np.ndenumerate(panels):
        values = shown[phases[row]][column]
        picture = axes.imshow(values, vmin=0, vmax=largest, cmap="viridis")
        for one, other in np.argwhere(np.isfinite(values)) if num_experts <= 8 else ():
            share = values[one, other]
            colour = "black" if share > 0.6 * largest else "white"
            axes.text(
                other, one, f"{share:.2f}", ha="center", va="center", fontsize=6, color=colour
            )
        axes.set(xticks=range(num_experts), yticks=range(num_experts))
        axes.tick_params(labelsize=7)
        if row == 0:
            axes.set_title(f"layer {layers[column]}", fontsize=8)
        if column == 0:
            axes.set_ylabel(f"{phases[row]}\nexpert", fontsize=8)
        if row == len(phases) - 1:
            axes.set_xlabel("expert", fontsize=8)
    bar = figure.colorbar(picture, ax=list(panels.flat), shrink=0.7)
    bar.ax.axhline(even, color="red", linewidth=1.5)
    bar.set_label("share of tokens; red line: every pair alike", fontsize=8)
    bar.ax.tick_params(labelsize=7)
    figure.suptitle("Experts that are chosen together", fontsize=11)
    return finish(figure, path)


def _legend(figure: "Figure", axes: "Axes", num_experts: int) -> None:
    handles, labels = axes.get_legend_handles_labels()
    figure.legend(
        handles,
        labels,
        title="expert",
        loc="outside right center",
        fontsize=8,
        frameon=False,
        ncols=1 + num_experts // 16,
    )


def _phase_title(phase: str, num_tokens: int) -> str:
    return f"{phase}: {num_tokens} token{'s' if num_tokens != 1 else ''}"


def _colour(number: int) -> str:
    return EXPERT_COLOURS[number % len(EXPERT_COLOURS)]
