"""`moellava serve`: a saved model behind OpenAI's chat completions."""

import os
from pathlib import Path
from typing import Annotated

import typer

from moellava.cli.model_options import Checkpoint, Device, Host, Port, open_model, shown_address


def serve(
    checkpoint: Checkpoint,
    host: Host = "127.0.0.1",
    port: Port = 8000,
    api_key: Annotated[
        str | None,
        typer.Option(
            help="What clients must send; MOELLAVA_API_KEY in the environment does the same."
        ),
    ] = None,
    name: Annotated[
        str | None, typer.Option(help="The model's name in requests; by default the folder's.")
    ] = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Longest answer, in tokens.")] = 512,
    max_waiting: Annotated[
        int, typer.Option(min=1, help="Requests at once; further ones get status 429.")
    ] = 64,
    batch_size: Annotated[int, typer.Option(min=1, help="Requests answered together.")] = 8,
    device: Device = None,
) -> None:
    """Answer OpenAI's chat completions over HTTP (research use only, not a medical device).

    Images are taken from requests only, as data: URIs of PNG, JPEG, DICOM or NIfTI.
    """
    from moellava.chat.messages import Limits
    from moellava.chat.server import listening
    from moellava.chat.server import serve as run

    listening(host, port).close()  # a port in use is said before the model is loaded
    loaded = open_model(checkpoint, device)
    served_name = name or Path(checkpoint.rstrip("/")).name
    typer.echo(f"{served_name} answers at http://{shown_address(host, port)}/v1 (Ctrl-C stops)")
    run(
        loaded,
        name=served_name,
        host=host,
        port=port,
        api_key=api_key or os.environ.get("MOELLAVA_API_KEY"),
        limits=Limits(new_tokens=max_new_tokens, waiting=max_waiting, batch=batch_size),
    )
