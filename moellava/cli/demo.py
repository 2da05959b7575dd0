"""`moellava demo`: the proof, without any hub, that an image changes the answer."""

import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from moellava.demo.run import DemoResult, HeldOutAnswer

NUM_SHOWN = 6  # questions in the table; all of them are in a file


def demo(
    out: Annotated[
        Path, typer.Option(help="Folder for data, parts, the checkpoint, answers and the picture.")
    ] = Path("moellava-demo"),
    steps: Annotated[
        int, typer.Option(min=1, help="Training steps of 8 images, 24 questions.")
    ] = 400,
    seed: Annotated[int, typer.Option(help="Of weights, crops, questions and data order.")] = 0,
    tiles: Annotated[
        int | None,
        typer.Option(min=2, help="Build the toy with at most so many tiles for large images."),
    ] = None,
) -> None:
    """Train a toy model on real medical images and ask it about others (about two minutes).

    The parts are untrained and small, in the file layouts of BiomedCLIP and TinyLlama; the images
    are real and come with scikit-image, pydicom and nilearn. The toy is not a medical model.
    """
    from moellava.demo.packages import require_packages

    require_packages()
    from moellava.demo.picture import save_picture
    from moellava.demo.run import ANSWERS_FILE, run_demo

    typer.echo(f"Training an untrained toy for {steps} steps in {out} ...")
    result = run_demo(out, num_steps=steps, seed=seed, tiles=tiles)
    picture = out / "answers.png"
    save_picture(result.answers, picture)
    _print_summary(result)
    _print_questions(result.answers)
    example = result.answers[0].row
    shutil.copyfile(str(example.images[0]), out / "held_out.png")
    ask = f'moellava ask {result.checkpoint} {out / "held_out.png"} "{example.question}"'
    held_out = out / "data" / "held_out.json"
    score = f"moellava eval {result.checkpoint} {held_out} --baselines all --out {out}/evaluation"
    typer.echo(
        f"\nAll questions and answers: {out / ANSWERS_FILE}\n"
        f"Picture: {picture}\n"
        f"Ask it:  {ask}\n"
        f"Score it (needs the extra eval): {score}\n\n"
        "This toy learned a dozen pictures in minutes. It is NOT a medical model: it only shows "
        "that the parts work."
    )


def _print_summary(result: "DemoResult") -> None:
    from rich.console import Console
    from rich.table import Table

    by_modality: dict[str, list[HeldOutAnswer]] = {}
    for item in result.answers:
        by_modality.setdefault(str(item.row.extra["modality"]), []).append(item)
    table = Table("modality", "questions", "right", title="Held-out crops, by the saved model")
    for modality, items in by_modality.items():
        right = sum(item.is_right for item in items) / len(items)
        table.add_row(modality, str(len(items)), f"{right:.1%}")
    table.add_section()
    count = str(len(result.answers))
    table.add_row("all", count, f"{result.accuracy:.1%}")
    table.add_row("all, the same model on blank images", count, f"{result.blank_accuracy:.1%}")
    table.add_row("all, always the most frequent answer", count, f"{result.majority_accuracy:.1%}")
    Console().print(table)


def _print_questions(answers: Iterable["HeldOutAnswer"]) -> None:
    """The first question about each modality, so that a wrong answer is seen as well as a right."""
    from rich.console import Console
    from rich.table import Table

    first = {item.row.extra["modality"]: item for item in reversed(list(answers))}
    table = Table("picture", "question", "answer", "truth", "", title="Some of the questions")
    for item in sorted(first.values(), key=lambda item: item.row.id)[:NUM_SHOWN]:
        table.add_row(
            str(item.row.extra["picture"]),
            item.row.question,
            item.answer,
            item.truth,
            "" if item.is_right else "wrong",
        )
    Console().print(table)
