"""What the commands that open a saved model share: the checkpoint, the device, the address."""

import sys
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from moellava.model.loaded_model import LoadedModel

Checkpoint = Annotated[
    str, typer.Argument(metavar="CHECKPOINT", help="Folder or hub id of a saved model.")
]
Device = Annotated[
    str | None, typer.Option(help="cpu, cuda, cuda:1, mps; by default a GPU if there is one.")
]
Host = Annotated[str, typer.Option(help="The address to listen on.")]
Port = Annotated[int, typer.Option(min=1, max=65535, help="The port to listen on.")]


def open_model(checkpoint: str, device: str | None) -> "LoadedModel":
    """The saved model; with a progress bar on a terminal."""
    from moellava.model.builder_enhanced import load_pretrained_model
    from moellava.model.load_options import default_device

    return load_pretrained_model(
        checkpoint, device=device or default_device(), progress=sys.stderr.isatty()
    )


def shown_address(host: str, port: int) -> str:
    """`host:port` as a browser takes it."""
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
