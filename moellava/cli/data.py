"""`moellava data check`, `moellava data convert`: datasets before training."""

import json
import sys
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from moellava.data.check import Report

app = typer.Typer(help="Datasets: check them before training, convert them.", no_args_is_help=True)

Source = Annotated[
    str,
    typer.Argument(
        metavar="FILE", help="A file (.json, .jsonl, .csv, .parquet, .npz), folder or hub id."
    ),
]
Images = Annotated[
    Path | None, typer.Option(help="The folder that relative image paths start from.")
]
Format = Annotated[str, typer.Option(help="The layout; auto tells it from the columns.")]
Split = Annotated[str | None, typer.Option(help="Such as train; needed if there are several.")]
Language = Annotated[str | None, typer.Option(help="Of SLAKE: en or zh; both if not given.")]
ClassNames = Annotated[
    str | None, typer.Option(help="Of a classification set, separated by commas, in order.")
]
DeriveAnswerType = Annotated[
    bool,
    typer.Option(
        "--derive-answer-type",
        help="If a row has no answer type: CLOSED for yes and no, else OPEN.",
    ),
]

_SHOWN = 20  # problems of a kind that are printed; --json and --out have all


@app.command()
def check(
    file: Source,
    images: Images = None,
    against: Annotated[
        str | None, typer.Option(help="Test data that must share no id and no image with FILE.")
    ] = None,
    against_images: Annotated[
        Path | None, typer.Option(help="Its image folder; else as for FILE.")
    ] = None,
    against_split: Annotated[str | None, typer.Option(help="Its split.")] = None,
    tokenizer: Annotated[
        str | None, typer.Option(help="Id or folder, for lengths in tokens; else words.")
    ] = None,
    max_distance: Annotated[
        int,
        typer.Option(
            min=0, max=32, help="Images are similar if at most so many of 64 hash bits differ."
        ),
    ] = 4,
    out: Annotated[
        Path | None, typer.Option(help="Folder for report.json and lengths.png.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the report as JSON.")] = False,
    format: Format = "auto",
    split: Split = None,
    language: Language = None,
    class_names: ClassNames = None,
    derive_answer_type: DeriveAnswerType = False,
) -> None:
    """Look at every row and every image of a dataset; exit status 1 if something is wrong.

    Reported are broken rows, empty turns, <image> marks without images and the reverse, missing
    and unreadable images, duplicate rows, and, with --against, ids and images (the same or similar)
    that the test data has too.
    """
    from moellava.data.check import check_rows
    from moellava.data.histogram import save_histogram, text_histogram
    from moellava.data.readers import read_rows

    read = partial(
        read_rows,
        format=format,
        language=language,
        class_names=_names(class_names),
        derive_answer_type=derive_answer_type,
        skip_bad=True,
    )
    rows = read(file, images=images, split=split)
    test = None
    if against is not None:
        test = read(against, images=against_images or images, split=against_split)
    report = check_rows(
        rows,
        against=test,
        tokenizer=None if tokenizer is None else _tokenizer(tokenizer),
        max_distance=max_distance,
        progress=not as_json and sys.stderr.isatty(),
    )
    text = json.dumps(report.as_dict(), ensure_ascii=False, indent=1)
    if out is not None:
        out.mkdir(parents=True, exist_ok=True)
        (out / "report.json").write_text(text, encoding="utf-8")
        save_histogram(report.lengths, report.unit, Path(file).name, out / "lengths.png")
    if as_json:
        typer.echo(text)
    else:
        _print_report(report)
        typer.echo(text_histogram(report.lengths, report.unit))
        _print_problems(report)
    if report.num_errors:
        raise typer.Exit(1)


@app.command()
def convert(
    file: Source,
    out: Annotated[
        Path, typer.Argument(help="The file to write: .json (LLaVA), .jsonl or .parquet.")
    ],
    images: Images = None,
    images_out: Annotated[
        Path | None,
        typer.Option(
            help="Folder for images without a file of their own; else `images` beside OUT."
        ),
    ] = None,
    copy_images: Annotated[
        bool, typer.Option("--copy-images", help="Copy images that are files there, too.")
    ] = False,
    allow_outside: Annotated[
        bool,
        typer.Option("--allow-outside", help="Put in images from outside the image folder, too."),
    ] = False,
    skip_bad: Annotated[
        bool, typer.Option("--skip-bad", help="Leave broken rows out, and list them.")
    ] = False,
    format: Format = "auto",
    split: Split = None,
    language: Language = None,
    class_names: ClassNames = None,
    derive_answer_type: DeriveAnswerType = False,
) -> None:
    """Write a dataset as LLaVA JSON, JSON lines or parquet; nothing of a row is lost."""
    from moellava.data.convert import convert_rows
    from moellava.data.readers import read_rows

    rows = read_rows(
        file,
        images=images,
        format=format,
        split=split,
        language=language,
        class_names=_names(class_names),
        derive_answer_type=derive_answer_type,
        skip_bad=skip_bad,
    )
    count = convert_rows(
        rows, out, images=images_out, copy_images=copy_images, allow_outside=allow_outside
    )
    typer.echo(f"{out}: {count:,} rows")
    for bad in rows.bad:
        typer.echo(f"left out: row {bad.index} (id {bad.id!r}): {bad.kind}: {bad.reason}")


def _names(text: str | None) -> list[str] | None:
    return None if text is None else [name.strip() for name in text.split(",") if name.strip()]


def _tokenizer(name: str) -> "PreTrainedTokenizerBase":
    from moellava.model.builder.parts import load_tokenizer  # takes a second to import

    return load_tokenizer(name)


def _print_report(report: "Report") -> None:
    counts = f"{report.num_rows:,} rows, {report.num_images:,} images"
    typer.echo(f"{report.source}, read as {report.format}: {counts}")
    for title, by_name in (("split", report.by_split), ("answer type", report.by_answer_type)):
        shares = ", ".join(f"{name} {count:,}" for name, count in by_name.most_common())
        typer.echo(f"{title:<12} {shares}")


def _print_problems(report: "Report") -> None:
    if not report.problems:
        typer.echo("nothing wrong")
    for kind in dict.fromkeys(problem.kind for problem in report.problems):
        problems = [problem for problem in report.problems if problem.kind == kind]
        level = "ERROR  " if problems[0].is_error else "warning"
        typer.echo(f"{level} {kind}: {len(problems):,}")
        for problem in problems[:_SHOWN]:
            typer.echo(f"        {problem.where}: {problem.detail}")
        if len(problems) > _SHOWN:
            typer.echo(f"        and {len(problems) - _SHOWN:,} more; --out DIR writes them all")
