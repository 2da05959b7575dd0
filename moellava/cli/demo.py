"""`moellava demo`: the proof, without any hub, that an image changes the answer."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from moellava.demo.run import DemoResult


def demo(
    out: Annotated[
        Path, typer.Option(help="Folder for the parts, the checkpoint and the picture.")
    ] = Path("moellava-demo"),
    steps: Annotated[
        int, typer.Option(min=1, help="Training steps of 8 images, 24 questions.")
    ] = 400,
    seed: Annotated[int, typer.Option(help="Of weights, crops, questions and data order.")] = 0,
) -> None:
    """Train a toy model on real medical images and ask it about images it has not seen (about two minutes).

    The parts are untrained and small, in the file layouts of BiomedCLIP and TinyLlama; the images are real and
    come with scikit-image, pydicom and nilearn. The toy is not a medical model.
    """
    from moellava.demo.picture import save_picture
    from moellava.demo.run import run_demo

    typer.echo(f"Training an untrained toy for {steps} steps in {out} ...")
    result = run_demo(out, num_steps=steps, seed=seed)
    picture = out / "answers.png"
    save_picture(result.examples, result.answers, picture)
    _print_table(result)
    example = result.examples[0]
    example.image.save(out / "held_out.png")
    typer.echo(
        f"\n{len(result.examples)} questions about held-out crops, answered by the reloaded checkpoint:\n"
        f"  the model                          {result.accuracy:6.1%}\n"
        f"  the same model, blank images       {result.blank_accuracy:6.1%}\n"
        f"  always the most frequent answer    {result.majority_accuracy:6.1%}\n\n"
        f"Picture: {picture}\n"
        f'Ask it:  moellava ask {result.checkpoint} {out / "held_out.png"} "{example.question}"\n\n'
        "This toy learned a dozen pictures in minutes. It is NOT a medical model: it only shows that the parts work."
    )


def _print_table(result: "DemoResult") -> None:
    from rich.console import Console
    from rich.table import Table

    from moellava.eval.metrics import is_exact_answer

    table = Table("image", "question", "answer", "truth", "", title="Held-out images")
    for example, answer in zip(result.examples, result.answers, strict=True):
        is_right = is_exact_answer(answer, example.answer)
        table.add_row(
            example.source, example.question, answer, example.answer, "" if is_right else "wrong"
        )
    Console().print(table)
