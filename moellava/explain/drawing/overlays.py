"""A picture and maps of its patches → figures with the maps on the original picture.

| name | what it gives |
|---|---|
| `draw_overlay` | the picture, a map on it, and the blank image's map on the same scale |
| `draw_tokens` | one map per answer token |
| `draw_heads` | attention to the image per layer and head |
| `draw_maps` | several named maps of one picture on one scale |
"""

from collections.abc import Sequence
from pathlib import Path
from textwrap import fill
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt
from PIL import Image

from moellava.explain.drawing.figures import finish, new_figure
from moellava.explain.frames import Frame

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.cm import ScalarMappable
    from matplotlib.figure import Figure

Array = npt.NDArray[np.float32]

MAX_TOKENS = 16
MAX_SIDE = 900  # pixels that a picture is drawn with; the figure itself is smaller
MAX_HEIGHT = 5.5  # inches of a panel
WIDE = 2.2  # width / height from which panels stand below each other


def draw_overlay(
    picture: Image.Image,
    frame: Frame,
    values: Array,
    blank: Array | None,
    *,
    title: str,
    label: str,
    is_signed: bool,
    smooth: bool = False,
    path: Path | str | None = None,
) -> "Figure":
    """Picture, overlay and, if given, the blank image's map; one colour bar for both maps.

    Args:
        values, blank: (rows, columns) of the part of the picture that `frame` says.
        is_signed: colours diverge from 0; otherwise they start there.
    """
    maps = [values] if blank is None else [values, blank]
    mappable = _scale(maps, is_signed)
    is_wide = picture.width > WIDE * picture.height
    num_panels = 1 + len(maps)
    side = 3.4
    aspect = picture.width / picture.height
    if is_wide:
        figure = new_figure(8.0, 0.9 + num_panels * (7.0 / aspect + 0.35))
        panels = figure.subplots(num_panels, 1)
    else:
        height = min(side / aspect, MAX_HEIGHT)
        figure = new_figure(num_panels * max(height * aspect, 2.1) + 0.9, height + 1.0)
        panels = figure.subplots(1, num_panels)
    _show(panels[0], picture)
    _outline(panels[0], frame)
    panels[0].set_title("the box is what the model sees", fontsize=9)
    _show(panels[1], picture, dim=True)
    _lay_on(panels[1], picture, frame, values, mappable, smooth)
    panels[1].set_title("on this picture", fontsize=9)
    if blank is not None:
        colour = tuple(int(level) for level in np.asarray(picture).reshape(-1, 3).mean(0))
        flat = Image.new("RGB", picture.size, (colour[0], colour[1], colour[2]))
        _show(panels[2], flat, dim=True)
        _lay_on(panels[2], flat, frame, blank, mappable, smooth)
        panels[2].set_title("same answer, blank image", fontsize=9)
    bar = figure.colorbar(mappable, ax=list(panels[1:]), shrink=0.85, pad=0.02)
    bar.set_label(fill(label, 34), fontsize=8)
    bar.ax.tick_params(labelsize=7)
    figure.suptitle(fill(title, 90), fontsize=11)
    return finish(figure, path)


def draw_tokens(
    picture: Image.Image,
    frame: Frame,
    maps: Sequence[Array],
    names: Sequence[str],
    *,
    label: str,
    is_signed: bool,
    path: Path | str | None = None,
) -> "Figure":
    """One overlay per token, on one scale, five in a row."""
    return draw_maps(
        picture, frame, maps, names, label=label, is_signed=is_signed, title=None, path=path
    )


def draw_maps(
    picture: Image.Image,
    frame: Frame,
    maps: Sequence[Array],
    names: Sequence[str],
    *,
    label: str,
    is_signed: bool,
    title: str | None,
    smooth: bool = False,
    path: Path | str | None = None,
) -> "Figure":
    """One overlay per name, on one scale, five in a row."""
    mappable = _scale(maps, is_signed)
    columns = min(5, len(maps))
    rows = -(-len(maps) // columns)
    aspect = picture.width / picture.height
    side = 2.4 if columns > 1 else 3.6
    height = min(side / aspect, MAX_HEIGHT)
    figure = new_figure(columns * side + 1.2, rows * (height + 0.35) + 0.5)
    panels = figure.subplots(rows, columns, squeeze=False)
    for panel in panels.flat[len(maps) :]:
        panel.axis("off")
    used = list(panels.flat[: len(maps)])
    for panel, values, name in zip(used, maps, names, strict=True):
        _show(panel, picture, dim=True)
        _lay_on(panel, picture, frame, values, mappable, smooth)
        panel.set_title(fill(name, 28), fontsize=8)
    bar = figure.colorbar(mappable, ax=list(panels.flat), shrink=0.9, pad=0.02)
    bar.set_label(fill(label, 34), fontsize=8)
    bar.ax.tick_params(labelsize=7)
    if title:
        figure.suptitle(fill(title, 90), fontsize=11)
    return finish(figure, path)


def draw_heads(share: Array, *, path: Path | str | None = None) -> "Figure":
    """(L, H) shares of attention that go to the image, as a grid of layers and heads."""
    num_layers, num_heads = share.shape
    figure = new_figure(max(3.6, 0.22 * num_heads + 1.8), max(2.4, 0.22 * num_layers + 1.2))
    axes = figure.subplots()
    picture = axes.imshow(share, vmin=0, vmax=max(float(share.max()), 1e-6), cmap="viridis")
    axes.set(
        xlabel="head",
        ylabel="layer",
        xticks=range(0, num_heads, max(1, num_heads // 8)),
        yticks=range(0, num_layers, max(1, num_layers // 11)),
    )
    axes.set_title("share of attention on the image", fontsize=10)
    figure.colorbar(picture, ax=axes, shrink=0.9)
    return finish(figure, path)


def _scale(maps: Sequence[Array], is_signed: bool) -> "ScalarMappable":
    """One colour scale for all maps: from 0, or symmetric about it."""
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import Normalize

    largest = max(float(np.abs(values).max()) for values in maps) or 1.0
    if is_signed:
        return ScalarMappable(Normalize(-largest, largest), "RdBu_r")
    return ScalarMappable(Normalize(0, largest), "inferno")


def _shown_size(picture: Image.Image) -> tuple[int, int]:
    factor = min(1.0, MAX_SIDE / max(picture.size))
    return max(1, round(picture.width * factor)), max(1, round(picture.height * factor))


def _show(axes: "Axes", picture: Image.Image, *, dim: bool = False) -> None:
    """The picture, in its own pixel coordinates; dim and grey below a map."""
    shown = picture.resize(_shown_size(picture), Image.Resampling.BILINEAR)
    if dim:
        shown = shown.convert("L").point(lambda level: level * 0.75).convert("RGB")
    axes.imshow(np.asarray(shown), extent=(0, picture.width, picture.height, 0))
    axes.set_xticks([])
    axes.set_yticks([])


def _outline(axes: "Axes", frame: Frame) -> None:
    from matplotlib.patches import Rectangle

    left, top, right, bottom = frame.visible
    axes.add_patch(
        Rectangle(
            (left, top), right - left, bottom - top, fill=False, edgecolor="#00c2a8", linewidth=2
        )
    )


def _lay_on(
    axes: "Axes",
    picture: Image.Image,
    frame: Frame,
    values: Array,
    mappable: "ScalarMappable",
    smooth: bool,
) -> None:
    """The map in colour, more opaque where it is far from 0; nothing outside the frame."""
    placed = frame.place(values, smooth=smooth, size=_shown_size(picture))
    is_seen = np.isfinite(placed)
    colours = np.asarray(mappable.to_rgba(np.where(is_seen, placed, 0.0)), dtype=np.float64)
    strength = np.abs(np.where(is_seen, placed, 0.0)) / float(mappable.get_clim()[1] or 1.0)
    colours[..., 3] = np.where(is_seen, 0.05 + 0.65 * np.clip(strength, 0, 1), 0.0)
    axes.imshow(colours, extent=(0, picture.width, picture.height, 0), interpolation="nearest")
    axes.set_xlim(0, picture.width)
    axes.set_ylim(picture.height, 0)
