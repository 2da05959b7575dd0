"""`moellava ask`: questions about images, answered by a saved model."""

import json
import os
from pathlib import Path
from typing import Annotated

import typer

from moellava.cli.image_options import (
    Channels,
    Frame,
    Frames,
    Plane,
    Region,
    Slices,
    SlideTiles,
    Window,
    part_options,
)
from moellava.cli.model_options import Checkpoint, Device, open_model


def ask(
    checkpoint: Checkpoint,
    items: Annotated[
        list[str],
        typer.Argument(
            metavar="IMAGE|QUESTION",
            help="Image files (PNG, JPEG, TIFF, DICOM, NIfTI, slides), folders of DICOM series "
            "(with a slash in them), and questions.",
        ),
    ],
    question: Annotated[
        list[str] | None,
        typer.Option(
            "--question", "-q", help="A question that could be taken for a file name; repeatable."
        ),
    ] = None,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print a JSON list of image, question and answer.")
    ] = False,
    device: Device = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Longest answer, in tokens.")] = 64,
    window: Window = None,
    frame: Frame = None,
    plane: Plane = None,
    slices: Slices = None,
    frames: Frames = None,
    channels: Channels = None,
    slide_tiles: SlideTiles = None,
    region: Region = None,
    tiles: Annotated[
        int | None,
        typer.Option(
            help="See a large image as at most so many tiles, too, whatever the model was built "
            "with; 0 is one view."
        ),
    ] = None,
) -> None:
    """Answer questions about images with a saved model.

    Every question is asked about each image alone. One answer is printed as it is; several are
    printed one per line as image, question and answer, separated by tabs.
    """
    images = [item for item in items if _is_file_name(item)]
    questions = [item for item in items if not _is_file_name(item)] + (question or [])
    if not images or not questions:
        missing = "image" if not images else "question"
        raise typer.BadParameter(
            f"no {missing} among {items}. Type: "
            'moellava ask CHECKPOINT scan.png "What modality is this?"'
        )
    for image in images:
        if not Path(image).exists():
            raise FileNotFoundError(
                f"The image {image} does not exist. (A question? Write --question {image!r}.)"
            )

    from moellava.images import image_parts, opened

    options = part_options(window, frame, plane, slices, frames, channels, slide_tiles, region)
    # Read before the model is loaded: an unreadable file should not cost a minute.
    parts = [[opened(part) for part in image_parts(image, **options)] for image in images]
    loaded = open_model(checkpoint, device)
    if tiles is not None:
        loaded.processor.set_tiling({"max_tiles": tiles} if tiles else None)
    rows = []
    for image, own in zip(images, parts, strict=True):
        answers = loaded.answer([own] * len(questions), questions, max_new_tokens=max_new_tokens)
        rows += [
            {"image": image, "question": text, "answer": answer}
            for text, answer in zip(questions, answers, strict=True)
        ]
    if as_json:
        typer.echo(json.dumps(rows, ensure_ascii=False, indent=1))
    elif len(rows) == 1:
        typer.echo(rows[0]["answer"])
    else:
        for row in rows:
            typer.echo("\t".join(row.values()))


def _is_file_name(item: str) -> bool:
    """Whether an argument is an image: it exists, or it has no spaces and looks like a path."""
    if Path(item).is_file() or (os.sep in item and Path(item).is_dir()):
        return True
    return not any(letter.isspace() for letter in item) and bool(
        Path(item).suffix or os.sep in item
    )
