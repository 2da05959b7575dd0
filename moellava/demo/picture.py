"""Held-out images with the questions, the model's answers and the truth, as one PNG."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from moellava.demo.images import MODALITIES
from moellava.demo.run import HeldOutAnswer
from moellava.images import load_image

if TYPE_CHECKING:
    from matplotlib.axes import Axes

NUM_COLUMNS = 4  # images of one modality
TITLE = "moellava demo: held-out crops. A toy after minutes of training, not a medical model."


def save_picture(answers: Sequence[HeldOutAnswer], path: Path) -> None:
    """Draw a row of held-out crops per modality, each with its questions.

    Wrong answers are red, with the truth.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(4 * NUM_COLUMNS, 4.6 * len(MODALITIES)))
    # Space for the questions above each crop.
    figure.subplots_adjust(left=0.02, right=0.98, bottom=0.01, top=0.945, hspace=0.28, wspace=0.16)
    FigureCanvasAgg(figure)
    axes = figure.subplots(len(MODALITIES), NUM_COLUMNS, squeeze=False)
    for row, modality in zip(axes, MODALITIES, strict=True):
        by_image: dict[str, list[HeldOutAnswer]] = {}
        for item in answers:
            if item.row.extra["modality"] == modality:
                by_image.setdefault(str(item.row.images[0]), []).append(item)
        for axis in row:
            axis.axis("off")
        for axis, group in zip(row, by_image.values(), strict=False):
            _draw_crop(axis, group)
    figure.suptitle(TITLE, y=0.99)
    figure.savefig(path, dpi=70)


def _draw_crop(axis: "Axes", group: Sequence[HeldOutAnswer]) -> None:
    axis.imshow(load_image(group[0].row.images[0]))
    for line, item in enumerate(reversed(group)):
        truth = "" if item.is_right else f"  (truth: {item.truth})"
        axis.text(
            0,
            1.01 + 0.075 * line,
            f"{item.row.question} {item.answer}{truth}",
            transform=axis.transAxes,
            fontsize=9,
            color="black" if item.is_right else "red",
        )
