"""`moellava explain`: what a model looked at, and which of its experts worked."""

import json
import sys
from pathlib import Path
from typing import Annotated

import typer
from typer.core import TyperGroup

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


class _AnswerByDefault(TyperGroup):
    """`moellava explain CHECKPOINT ...` is `moellava explain answer CHECKPOINT ...`."""

    def parse_args(self, ctx: typer.Context, args: list[str]) -> list[str]:  # type: ignore[override]
        """Put the command's name before a first word that is not one."""
        if args and args[0] not in self.commands and args[0] != "--help":
            args = ["answer", *args]
        rest: list[str] = super().parse_args(ctx, args)
        return rest


app = typer.Typer(
    cls=_AnswerByDefault,
    help=(
        "What a model looked at and which experts worked: "
        'moellava explain CHECKPOINT IMAGE "QUESTION" --out DIR.'
    ),
    short_help="Pictures of attention, causes and experts for an answer or a data set.",
    no_args_is_help=True,
)


@app.command()
def answer(
    checkpoint: Checkpoint,
    image: Annotated[
        Path, typer.Argument(metavar="IMAGE", help="PNG, JPEG, TIFF, DICOM or NIfTI.")
    ],
    question: Annotated[str, typer.Argument(metavar="QUESTION")],
    out: Annotated[Path, typer.Option(help="Folder for the PNGs and index.html.")],
    answer: Annotated[
        str | None, typer.Option(help="Explain this answer in place of the model's own.")
    ] = None,
    ablation: Annotated[
        bool, typer.Option(help="Draw the causal map; one pass per block of pixels.")
    ] = True,
    blocks: Annotated[
        int | None, typer.Option(min=1, help="Blocks of the causal map per side; half the patches.")
    ] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Blocks that go through at once.")] = 8,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Longest answer, in tokens.")] = 64,
    device: Device = None,
    window: Window = None,
    frame: Frame = None,
    plane: Plane = None,
    slices: Slices = None,
    frames: Frames = None,
    channels: Channels = None,
    slide_tiles: SlideTiles = None,
    region: Region = None,
) -> None:
    """Answer a question about an image and draw what happened inside.

    The folder receives one PNG per picture and index.html, which holds all of them.
    """
    if not image.exists():
        raise FileNotFoundError(f"The image {image} does not exist.")
    from moellava.explain import explain, write_page
    from moellava.images import image_parts, opened

    # Read before the model is loaded: an unreadable file should not cost a minute.
    options = part_options(window, frame, plane, slices, frames, channels, slide_tiles, region)
    parts = [opened(part) for part in image_parts(image, **options)]
    loaded = open_model(checkpoint, device)
    explanation = explain(
        loaded,
        parts,
        question,
        answer=answer,
        gradient=True,
        ablation=ablation,
        blocks=None if blocks is None else (blocks, blocks),
        batch_size=batch_size,
        progress=sys.stderr.isatty(),
        max_new_tokens=max_new_tokens,
    )
    page = write_page(explanation, out)
    typer.echo(explanation.answer)
    if explanation.no_grid:
        typer.echo(explanation.no_grid, err=True)
    typer.echo(f"open {page}")


@app.command()
def routing(
    checkpoint: Checkpoint,
    data: Annotated[
        str,
        typer.Argument(
            metavar="DATA", help="A file (.json, .jsonl, .csv, .parquet, .npz), folder or hub id."
        ),
    ],
    group_by: Annotated[
        str, typer.Option(help="answer_type, source, split, or a further field of the rows.")
    ],
    out: Annotated[Path, typer.Option(help="Folder for routing.json and the pictures.")],
    images: Annotated[
        Path | None, typer.Option(help="The folder that relative image paths start from.")
    ] = None,
    split: Annotated[str | None, typer.Option(help="Such as test; needed if several.")] = None,
    limit: Annotated[
        int | None, typer.Option(min=1, help="Route so many rows, evenly spaced; all by default.")
    ] = None,
    batch_size: Annotated[int, typer.Option(min=1)] = 8,
    seed: Annotated[int, typer.Option(help="Of the bootstrap and the shuffled labels.")] = 0,
    device: Device = None,
) -> None:
    """Compare which experts work for groups of a data set's rows.

    Prints the mutual information of group and expert per phase and layer, beside that of shuffled
    labels.
    """
    from moellava.data import read_rows
    from moellava.explain import route_dataset
    from moellava.explain.dataset_routing import NOT_SHOWN, group_of

    rows = read_rows(data, images=images, split=split)
    chosen = [rows[index] for index in _spread(len(rows), limit)]
    for row in chosen:
        group_of(row, group_by)  # an unknown field is said before the model is loaded
    result = route_dataset(
        open_model(checkpoint, device),
        chosen,
        group_by=group_by,
        batch_size=batch_size,
        seed=seed,
        progress=sys.stderr.isatty(),
    )
    out.mkdir(parents=True, exist_ok=True)
    text = json.dumps(result.to_dict(), indent=1) + "\n"
    (out / "routing.json").write_text(text, encoding="utf-8")
    result.draw(out / "routing.png")
    result.draw_coactivation(out / "coactivation.png")
    counts = ", ".join(f"{group} {count}" for group, count in result.num_rows.items())
    typer.echo(f"{len(chosen)} rows: {counts}")
    typer.echo("mutual information of group and expert, bits (95 % of shuffled labels are below):")
    for phase, layers in result.information.items():
        texts = [f"{layer.bits:.4f} ({layer.shuffled_95:.4f})" for layer in layers]
        typer.echo(f"  {phase:9} {'  '.join(texts)}")
    typer.echo(NOT_SHOWN)
    names = ("routing.json", "routing.png", "coactivation.png")
    typer.echo(f"written: {', '.join(str(out / name) for name in names)}")


def _spread(num_rows: int, limit: int | None) -> list[int]:
    """At most `limit` row numbers, evenly spaced, so that ordered groups all keep their share."""
    if limit is None or limit >= num_rows:
        return list(range(num_rows))
    return [number * num_rows // limit for number in range(limit)]
