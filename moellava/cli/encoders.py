"""`moellava encoders show`, `moellava encode`, `moellava classify`: image towers."""

import sys
from pathlib import Path
from typing import Annotated

import typer

from moellava.cli.image_options import Frame, Plane, Window, view_options
from moellava.messages import first_names

app = typer.Typer(help="Image towers.", no_args_is_help=True)
app.callback()(lambda: None)  # keeps `show` a subcommand while it is the only one

Tower = Annotated[str, typer.Argument(help="A repo id, a folder, or a file of weights.")]
Encoder = Annotated[
    str, typer.Option(help="The image tower: a repo id, a folder, or a file of weights.")
]
Revision = Annotated[str | None, typer.Option(help="A branch, tag or commit of the repo.")]
CacheDir = Annotated[
    Path | None, typer.Option(help="The Hugging Face cache, if not the usual one.")
]
Device = Annotated[str | None, typer.Option(help="Such as cuda; the CPU if not given.")]
LocalFilesOnly = Annotated[bool, typer.Option("--local-files-only", help="Never use the network.")]


@app.command()
def show(
    tower: Tower,
    revision: Revision = None,
    cache_dir: CacheDir = None,
    local_files_only: LocalFilesOnly = False,
) -> None:
    """Print which files a tower would be loaded from, without loading or fetching them."""
    from moellava.encoders.factory import detect_encoder_type, kind_of
    from moellava.storage.sources import HubOptions, commit_of, parse_source

    hub = HubOptions(revision=revision, cache_dir=cache_dir, local_files_only=local_files_only)
    source = parse_source(tower, hub)
    encoder_type = detect_encoder_type(tower, download=False, **hub.keywords)
    pairs = kind_of(encoder_type, tower).files(source)
    typer.echo(f"tower     {source.name}")
    typer.echo(f"type      {encoder_type}")
    commit = next((commit_of(path) for _, path in pairs if path), None)
    typer.echo(f"revision  {commit or revision or '-'}")
    for name, path in pairs:
        size = f"  ({path.stat().st_size:,} bytes)" if path else "  not on this machine"
        typer.echo(f"file      {path or name}{size}")
    missing = [name for name, path in pairs if path is None]
    if missing:
        pin = f" --revision {revision}" if revision else ""
        typer.echo(f"fetch     hf download {source.repo_id} {' '.join(missing)}{pin}")


def encode(
    folder: Annotated[
        Path, typer.Argument(help="A folder of images, searched with its subfolders.")
    ],
    out: Annotated[Path, typer.Option(help="The safetensors file to write.")],
    encoder: Encoder = "microsoft/BiomedCLIP-PubMedBERT_256-vit_base_patch16_224",
    batch_size: Annotated[int, typer.Option(min=1)] = 16,
    select_layer: Annotated[
        int | None, typer.Option(help="LLaVA's count; -2 if not given.")
    ] = None,
    image_size: Annotated[
        int | None, typer.Option(help="Pixels; the trained size if not given.")
    ] = None,
    device: Device = None,
    precision: Annotated[
        str | None,
        typer.Option(
            help="float32, bfloat16, or auto: bfloat16 where it is fast. As the tower is loaded if "
            "not given, which is float32 for BiomedCLIP."
        ),
    ] = None,
    settings: Annotated[
        list[str] | None,
        typer.Option(
            "--set",
            metavar="OPTION=VALUE",
            help="Any option of the encoder, such as final_norm=true; repeatable.",
        ),
    ] = None,
    window: Window = None,
    frame: Frame = None,
    plane: Plane = None,
    revision: Revision = None,
    cache_dir: CacheDir = None,
    local_files_only: LocalFilesOnly = False,
) -> None:
    """Write the patch tokens of a folder of images to a safetensors file; a killed run resumes."""
    from moellava.encoders import create_encoder
    from moellava.encoders.feature_file import encode_files
    from moellava.encoders.precision import choose_precision
    from moellava.images import image_suffixes
    from moellava.images.folder import find_images

    view = view_options(window, frame, plane)
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder} is not a folder.")
    paths, without_pixels = find_images(folder)
    if not paths:
        raise ValueError(
            f"{folder} holds no image; looked for {', '.join(image_suffixes())}, "
            "and DICOM by content."
        )
    options = _encoder_options(settings or [], select_layer=select_layer, image_size=image_size)
    tower = create_encoder(
        None,
        encoder,
        device=device,
        revision=revision,
        cache_dir=cache_dir,
        local_files_only=local_files_only,
        **options,  # type: ignore[arg-type]  # mypy takes them for any of the other keywords
    )
    if without_pixels:
        skipped = first_names([str(path.relative_to(folder)) for path in without_pixels])
        typer.echo(f"{len(without_pixels)} DICOM files without pixels are skipped: {skipped}")
    names = [path.relative_to(folder).as_posix() for path in paths]
    if precision is not None:
        dtype, reason = choose_precision(precision, tower.device)
        precision = str(dtype).removeprefix("torch.")
        typer.echo(f"precision: {precision}, {reason}")
    done = encode_files(
        tower,
        paths,
        names,
        out,
        batch_size=batch_size,
        progress=sys.stderr.isatty(),
        precision=precision,
        view=view,
    )
    typer.echo(
        f"{out}: {len(paths)} images, {tower.num_patches} patch tokens of width {tower.hidden_size}"
    )
    if done:
        typer.echo(f"{done} of them were there from an interrupted run")


def classify(
    image: Annotated[list[Path], typer.Argument(help="One image or several.")],
    labels: Annotated[str, typer.Option(help="Labels, separated by commas.")],
    template: Annotated[
        str, typer.Option(help="The sentence around a label.")
    ] = "this is a photo of {}",
    encoder: Encoder = "microsoft/BiomedCLIP-PubMedBERT_256-vit_base_patch16_224",
    device: Device = None,
    window: Window = None,
    frame: Frame = None,
    plane: Plane = None,
    revision: Revision = None,
    cache_dir: CacheDir = None,
    local_files_only: LocalFilesOnly = False,
) -> None:
    """Print the probability of each label for each image (zero-shot, research use only)."""
    from moellava.encoders import BiomedClipEncoder, create_encoder
    from moellava.images import to_pil

    view = view_options(window, frame, plane)
    # Read before the tower is loaded: an unreadable file should not cost a minute.
    pictures = [to_pil(path, **view) for path in image]
    names = [label.strip() for label in labels.split(",") if label.strip()]
    tower = create_encoder(
        "biomedclip",
        encoder,
        load_text=True,
        device=device,
        revision=revision,
        cache_dir=cache_dir,
        local_files_only=local_files_only,
    )
    assert isinstance(tower, BiomedClipEncoder)  # the only kind that takes load_text
    probabilities = tower.zero_shot(pictures, names, template=template)
    for path, row in zip(image, probabilities.tolist(), strict=True):
        typer.echo(str(path))
        for probability, name in sorted(zip(row, names, strict=True), reverse=True):
            typer.echo(f"  {probability:.4f}  {name}")


def _encoder_options(
    settings: list[str], *, select_layer: int | None, image_size: int | None
) -> dict[str, object]:
    """`--set NAME=VALUE` and the two options with names of their own."""
    from moellava.storage.settings_file import override

    named = {"select_layer": select_layer, "image_size": image_size}
    words = [f"{name}={value}" for name, value in named.items() if value is not None] + settings
    names = [word.partition("=")[0] for word in words]
    if twice := [name for name in names if names.count(name) > 1]:
        raise typer.BadParameter(f"{twice[0]} is given twice.")
    options: dict[str, object] = {}
    override(options, words)
    return options
