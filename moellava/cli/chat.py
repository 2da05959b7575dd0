"""`moellava chat`: a conversation with a saved model, in a terminal."""

import sys
from contextlib import suppress
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


def chat(
    checkpoint: Checkpoint,
    images: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="IMAGE", help="Images of the first question (PNG, JPEG, DICOM, NIfTI)."
        ),
    ] = None,
    system: Annotated[str | None, typer.Option(help="The system prompt.")] = None,
    device: Device = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Longest answer, in tokens.")] = 256,
    window: Window = None,
    frame: Frame = None,
    plane: Plane = None,
    slices: Slices = None,
    frames: Frames = None,
    channels: Channels = None,
    slide_tiles: SlideTiles = None,
    region: Region = None,
) -> None:
    """Talk with a saved model about images.

    Answers appear as they are written; Ctrl-C stops one. /help lists the commands.
    """
    view = part_options(window, frame, plane, slices, frames, channels, slide_tiles, region)
    for image in images or ():
        if not Path(image).exists():
            raise FileNotFoundError(f"The image {image} does not exist.")

    from moellava.chat.terminal import TerminalChat

    if sys.stdin.isatty():
        with suppress(ImportError):  # Windows, whose console has them itself
            import readline  # noqa: F401  # gives input() its arrow keys and history
    loaded = open_model(checkpoint, device)
    TerminalChat(
        loaded,
        read=input,
        write=lambda text: typer.echo(text, nl=False),
        parse_view=parse_view,
        model_name=checkpoint,
        system=system,
        generation={"max_new_tokens": max_new_tokens},
        view={**view},
    ).run(images or ())


def parse_view(name: str, text: str) -> object:
    """The value of an option of the images that was typed; None takes it back."""
    if text == "none":
        return None
    names = ("window", "frame", "plane", "slices", "frames", "channels")
    window, frame, plane, slices, frames, channels = (
        text if known == name else None for known in names
    )
    view: dict[str, object] = {**part_options(window, frame, plane, slices, frames, channels)}
    return view[name]
