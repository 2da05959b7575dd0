"""`moellava web`: a page in the browser to talk with a saved model about images."""

from pathlib import Path
from typing import Annotated

import typer

from moellava.cli.model_options import Checkpoint, Device, Host, Port, open_model, shown_address


def web(
    checkpoint: Checkpoint,
    host: Host = "127.0.0.1",
    port: Port = 7860,
    name: Annotated[
        str | None, typer.Option(help="The model's name on the page; by default the folder's.")
    ] = None,
    system: Annotated[str | None, typer.Option(help="The system prompt.")] = None,
    max_new_tokens: Annotated[
        int, typer.Option(min=1, max=1024, help="Longest answer, in tokens.")
    ] = 256,
    device: Device = None,
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

    listening(host, port).close()  # a port in use is said before the model is loaded
    loaded = open_model(checkpoint, device)
    typer.echo(f"open http://{shown_address(host, port)} (Ctrl-C stops)")
    serve_web(
        loaded,
        name=name or Path(checkpoint.rstrip("/")).name,
        host=host,
        port=port,
        system=system,
        max_new_tokens=max_new_tokens,
    )
