"""`moellava export mixtral` and `export onnx`: a checkpoint in other runtimes' layouts."""

from pathlib import Path
from typing import Annotated

import typer

from moellava.cli.model_options import Checkpoint

app = typer.Typer(help="A checkpoint in other runtimes' layouts.", no_args_is_help=True)

Out = Annotated[Path, typer.Option(help="The folder to write; it must not hold anything.")]


@app.command()
def mixtral(
    checkpoint: Checkpoint,
    out: Out,
    max_shard_size: Annotated[
        str, typer.Option(help="Largest file of weights; memory is about that much.")
    ] = "2GB",
) -> None:
    """Write the language model in Mixtral's layout, for transformers, vLLM and llama.cpp."""
    from moellava.export import export_mixtral

    written = export_mixtral(checkpoint, out, max_shard_size=max_shard_size)
    config = written.config
    typer.echo(
        f"{out}: {config.num_hidden_layers} layers of {config.num_local_experts} experts, "
        f"{config.num_experts_per_tok} per token, {written.parameters:,} weights"
    )
    if written.parameters > written.parameters_before:
        typer.echo(
            f"{written.parameters - written.parameters_before:,} of them are copies or zeros: "
            f"{len(written.dense_layers)} dense layers became equal experts"
        )


@app.command()
def onnx(
    source: Annotated[
        str, typer.Argument(help="Folder or hub id of a saved model, or of an image tower.")
    ],
    out: Out,
) -> None:
    """Write the image tower and the projector as ONNX graphs, checked in onnxruntime."""
    from moellava.export import export_onnx

    written = export_onnx(source, out)
    for name, difference in written.differences.items():
        size = (written.folder / name).stat().st_size
        typer.echo(f"{out / name}: {size:,} bytes, {difference:.1e} from torch's output")
