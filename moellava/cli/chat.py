"""`moellava chat`: a conversation with a saved model, in a terminal."""

import sys
from pathlib import Path
from typing import Annotated

import typer

from moellava.cli.image_options import Frame, Plane, Window, view_options


def chat(
    checkpoint: Annotated[
        str, typer.Argument(metavar="CHECKPOINT", help="Folder or hub id of a saved model.")
    ],
    images: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="IMAGE", help="Images of the first question (PNG, JPEG, DICOM, NIfTI)."
        ),
    ] = None,
    system: Annotated[str | None, typer.Option(help="The system prompt.")] = None,
    device: Annotated[
        str | None,
        typer.Option(help="cpu, cuda, cuda:1, mps; by default a GPU if there is one."),
    ] = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Longest answer, in tokens.")] = 256,
    window: Window = None,
    frame: Frame = None,
    plane: Plane = None,
) -> None:
    """Talk with a saved model about images.

    Answers appear as they are written; Ctrl-C stops one. /help lists the commands.
    """
    view = view_options(window, frame, plane)
    for image in images or ():
        if not Path(image).is_file():
            raise FileNotFoundError(f"The image {image} does not exist.")

    from moellava.chat.terminal import TerminalChat
    from moellava.model.builder_enhanced import load_pretrained_model
    from moellava.model.load_options import default_device

    if sys.stdin.isatty():
        import readline  # noqa: F401  # gives input() its arrow keys and history
    loaded = load_pretrained_model(
        checkpoint, device=device or default_device(), progress=sys.stderr.isatty()
    )
    TerminalChat(
        loaded,
        read=input,
        write=lambda text: typer.echo(text, nl=False),
        parse_view=_parse_view,
        model_name=checkpoint,
        system=system,
        generation={"max_new_tokens": max_new_tokens},
        view={**view},
    ).run(images or ())


def _parse_view(name: str, text: str) -> object:
    texts: dict[str, str | None] = dict.fromkeys(("window", "frame", "plane")) | {name: text}
    view: dict[str, object] = {**view_options(**texts)}
    return view[name]
