"""Held-out images with the questions, the model's answers and the truth, as one PNG."""

from collections.abc import Sequence
from pathlib import Path

from moellava.demo.images import MODALITIES
from moellava.demo.questions import Example
from moellava.eval.metrics import is_exact_answer

NUM_COLUMNS = 4  # images of one modality


def save_picture(examples: Sequence[Example], answers: Sequence[str], path: Path) -> None:
    """Draw a row of held-out crops per modality, each with its questions; wrong answers are red, with the truth."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(4 * NUM_COLUMNS, 4.6 * len(MODALITIES)))
    figure.subplots_adjust(
        left=0.02, right=0.98, bottom=0.01, top=0.945, hspace=0.28, wspace=0.16
    )  # room for questions
    FigureCanvasAgg(figure)
    axes = figure.subplots(len(MODALITIES), NUM_COLUMNS, squeeze=False)
    for row, modality in zip(axes, MODALITIES, strict=True):
        by_image: dict[int, list[tuple[Example, str]]] = {}
        for example, answer in zip(examples, answers, strict=True):
            if example.modality == modality:
                by_image.setdefault(id(example.image), []).append((example, answer))
        for axis in row:
            axis.axis("off")
        for axis, group in zip(row, by_image.values(), strict=False):
            axis.imshow(group[0][0].image)
            for line, (example, answer) in enumerate(reversed(group)):
                is_right = is_exact_answer(answer, example.answer)
                text = f"{example.question} {answer}" + (
                    "" if is_right else f"  (truth: {example.answer})"
                )
                axis.text(
                    0,
                    1.01 + 0.075 * line,
                    text,
                    transform=axis.transAxes,
                    fontsize=9,
                    color="black" if is_right else "red",
                )
    figure.suptitle(
        "moellava demo: held-out crops. An untrained toy after minutes of training, not a medical model.",
        y=0.99,
    )
    figure.savefig(path, dpi=70)
