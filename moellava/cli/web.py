"""`moellava web`: a page in the browser to talk with a saved model about images."""

import sys
from pathlib import Path
from typing import Annotated

import typer


def web(
    checkpoint: Annotated[
        str, typer.Argument(metavar="CHECKPOINT", help="Folder or hub id of a saved model.")
    ],
    host: Annotated[str, typer.Option(help="The address to listen on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=1, max=65535, help="The port to listen on.")] = 7860,
    name: Annotated[
        str | None, typer.Option(help="The model's name on the page; by default the folder's.")
    ] = None,
    system: Annotated[str | None, typer.Option(help="The system prompt.")] = None,
    max_new_tokens: Annotated[
        int, typer.Option(min=1, max=1024, help="Longest answer, in tokens.")
    ] = 256,
    device: Annotated[
        str | None,
        typer.Option(help="cpu, cuda, cuda:1, mps; by default a GPU if there is one."),
    ] = None,
) -> None:
    """Show a page to talk with a saved model (research use only, not a medical device).

    Images, DICOM series and NIfTI volumes are uploaded to this process alone, and deleted when the
    page is closed.
    """
    try:
        from moellava.chat.web.app import serve_web
    except ImportError as error:
        if error.name not in ("gradio", "fastapi", "uvicorn"):
            raise
        raise ImportError(
            "The page needs gradio. Type: pip install 'moellava[web]'", name=error.name
        ) from error
    from moellava.chat.server import listening
    from moellava.model.builder_enhanced import load_pretrained_model
    from moellava.model.load_options import default_device

    listening(host, port).close()  # a port in use is said before the model is loaded
    loaded = load_pretrained_model(
        checkpoint, device=device or default_device(), progress=sys.stderr.isatty()
    )
    shown = f"[{host}]" if ":" in host else host
    typer.echo(f"open http://{shown}:{port} (Ctrl-C stops)")
    serve_web(
        loaded,
        name=name or Path(checkpoint.rstrip("/")).name,
        host=host,
        port=port,
        system=system,
        max_new_tokens=max_new_tokens,
    )
