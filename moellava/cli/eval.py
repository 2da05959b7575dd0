"""`moellava eval`: ask a model a data set's questions, score predictions, compare two models."""

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer.core import TyperGroup

from moellava.cli.model_options import Checkpoint, Device

if TYPE_CHECKING:
    from moellava.eval.questions import Question


class _Eval(TyperGroup):
    """`moellava eval CHECKPOINT DATA` is `moellava eval run CHECKPOINT DATA`."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        if args and args[0] not in self.commands and args[0] != "--help":
            args = ["run", *args]
        return super().parse_args(ctx, args)


app = typer.Typer(
    cls=_Eval,
    help="Evaluate: moellava eval CHECKPOINT DATA --out DIR; score and compare predictions.",
    no_args_is_help=True,
)

Split = Annotated[str | None, typer.Option(help="Such as test; needed if there are several.")]
Images = Annotated[
    Path | None, typer.Option(help="The folder that relative image paths start from.")
]
Language = Annotated[str | None, typer.Option(help="Of SLAKE: en or zh; both if not given.")]
ClassNames = Annotated[
    str | None, typer.Option(help="Of a classification set, separated by commas, in order.")
]
Scorer = Annotated[
    list[str] | None, typer.Option(help="A rule, such as strict or llava_med; repeatable.")
]
GroupBy = Annotated[
    list[str] | None, typer.Option(help="A field of the rows to score by; repeatable.")
]
Resamples = Annotated[int, typer.Option(min=1, help="Of the bootstrap over images.")]


@app.command()
def run(
    checkpoint: Checkpoint,
    data: Annotated[
        str, typer.Argument(metavar="DATA", help="A file, folder or hub id that has answers.")
    ],
    out: Annotated[
        Path, typer.Option(help="Folder for predictions.jsonl, scores.json and report.html.")
    ],
    split: Split = None,
    images: Images = None,
    language: Language = None,
    class_names: ClassNames = None,
    limit: Annotated[int | None, typer.Option(min=1, help="Only so many questions.")] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Questions answered at once.")] = 8,
    device: Device = None,
    dtype: Annotated[
        str | None, typer.Option(help="float32, bfloat16; by default the checkpoint's own.")
    ] = None,
    prompt: Annotated[
        str, typer.Option(help="none, short, yes_no_all, medevalkit, or a text of your own.")
    ] = "none",
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Longest answer, in tokens.")] = 64,
    scorer: Scorer = None,
    group_by: GroupBy = None,
    baselines: Annotated[
        str,
        typer.Option(help="all, none, or names: blank,other_image,no_image,most_frequent."),
    ] = "none",
    train: Annotated[
        str | None, typer.Option(help="The training split, for the most frequent answers.")
    ] = None,
    leaks: Annotated[
        str | None,
        typer.Option(help="A training set: also score without the images that it has."),
    ] = None,
    train_split: Annotated[
        str | None, typer.Option(help="Of --train and --leaks, if they have several.")
    ] = None,
    resamples: Resamples = 1000,
) -> None:
    """Ask a model every question of a data set and score its answers.

    Type it again after an interruption: it carries on where it stopped.
    """
    from moellava.eval.baselines import ALL_BASELINES
    from moellava.eval.run import evaluate
    from moellava.eval.settings import EvaluationSettings
    from moellava.eval.text_table import text_table

    named = {"all": ALL_BASELINES, "none": ()}.get(baselines, _names(baselines))
    settings = EvaluationSettings(
        prompt=prompt,
        max_new_tokens=max_new_tokens,
        limit=limit,
        batch_size=batch_size,
        device=device,
        dtype=dtype,
        scorers=scorer or (),
        group_by=group_by,
        baselines=named,
        num_resamples=resamples,
        progress=sys.stderr.isatty(),
    )
    scores = evaluate(
        checkpoint,
        data,
        out,
        settings,
        split=split,
        images=images,
        language=language,
        class_names=_class_names(class_names),
        train=train,
        leaks=leaks,
        train_split=train_split,
    )
    typer.echo(text_table(scores))
    _say_counts(scores)
    typer.echo(f"{out / 'report.html'}")


@app.command()
def score(
    predictions: Annotated[
        Path,
        typer.Argument(
            metavar="PREDICTIONS",
            help="JSON lines: our own, LLaVA's answers, lmms-eval's samples, others with --keys.",
        ),
    ],
    data: Annotated[
        str | None, typer.Option(help="The data that was asked, for files without truths.")
    ] = None,
    out: Annotated[
        Path | None, typer.Option(help="Folder for predictions.jsonl, scores.json, report.html.")
    ] = None,
    keys: Annotated[
        str | None,
        typer.Option(help="Names of other keys: answer=output.text,truth=gold,id=n."),
    ] = None,
    split: Split = None,
    images: Images = None,
    language: Language = None,
    class_names: ClassNames = None,
    scorer: Scorer = None,
    group_by: GroupBy = None,
    resamples: Resamples = 1000,
    judge_url: Annotated[
        str | None,
        typer.Option(help="An OpenAI-compatible server (.../v1) that also judges open answers."),
    ] = None,
    judge_model: Annotated[str | None, typer.Option(help="The model's name there.")] = None,
) -> None:
    """Score the predictions of any model, without a model and without torch."""
    from moellava.eval.judge import Judge
    from moellava.eval.score_file import score_file, write_scores
    from moellava.eval.scores import summarize
    from moellava.eval.statistics import Resamples
    from moellava.eval.text_table import text_table

    asked = None
    if data is not None:
        names = _class_names(class_names)
        asked = _questions(data, group_by, split, images, language, names)
    named = None if keys is None else _pairs(keys)
    judge = None
    if judge_url is not None:
        if judge_model is None or out is None:
            raise typer.BadParameter("--judge-url also needs --judge-model and --out")
        judge = Judge(url=judge_url, model=judge_model)
    if out is not None:
        scores = write_scores(
            predictions,
            out,
            questions=asked,
            keys=named,
            scorers=scorer or (),
            group_by=group_by,
            num_resamples=resamples,
            judge=judge,
        )
    else:
        table, join = score_file(
            predictions, questions=asked, keys=named, scorers=scorer or (), group_by=group_by
        )
        drawn = Resamples(table.clusters, num_resamples=resamples)
        scores = {**summarize(table, drawn), "join": join.as_dict()}
    typer.echo(text_table(scores))
    _say_counts(scores)


@app.command()
def compare(
    first: Annotated[Path, typer.Argument(metavar="A", help="Predictions, or a folder of eval.")],
    second: Annotated[Path, typer.Argument(metavar="B", help="Those of another model.")],
    out: Annotated[Path | None, typer.Option(help="A file for the whole comparison, JSON.")] = None,
    scorer: Scorer = None,
    group_by: GroupBy = None,
    resamples: Resamples = 1000,
) -> None:
    """What differs between two models' answers to the same questions, A minus B.

    `first` and `second` count the questions that only A and only B has right; p is McNemar's test.
    """
    from moellava.eval.compare import compare as compare_predictions
    from moellava.eval.predictions import read_predictions
    from moellava.eval.scorers import find_scorers
    from moellava.eval.text_table import difference_table
    from moellava.storage.writing import write_json

    one, other = (
        list(read_predictions(path / "predictions.jsonl" if path.is_dir() else path))
        for path in (first, second)
    )
    found = compare_predictions(
        one, other, find_scorers(scorer or ()), group_by=group_by, num_resamples=resamples
    )
    typer.echo(difference_table(found, group_by or ()))
    for name, ids in (("A", found["only_first"]), ("B", found["only_second"])):
        if isinstance(ids, list) and ids:
            typer.echo(f"only {name} answers {len(ids):,} questions: they are left out")
    if out is not None:
        write_json(out, found)


@app.command(name="lmms-tasks")
def lmms_tasks() -> None:
    """Print the folder of the tasks for lmms-eval: lmms-eval --include_path FOLDER."""
    from moellava.eval.lmms import tasks_folder

    typer.echo(tasks_folder())


def _names(text: str) -> tuple[str, ...]:
    return tuple(name.strip() for name in text.split(",") if name.strip())


def _pairs(text: str) -> dict[str, str]:
    pairs = [item.partition("=") for item in _names(text)]
    for name, sign, key in pairs:
        if not (sign and key):
            raise typer.BadParameter(
                f"--keys has {name!r}; expected FIELD=KEY, such as answer=text"
            )
    return {name.strip(): key.strip() for name, _, key in pairs}


def _class_names(text: str | None) -> tuple[str, ...] | None:
    return None if text is None else _names(text)


def _questions(
    data: str,
    group_by: Sequence[str] | None,
    split: str | None,
    images: Path | None,
    language: str | None,
    class_names: Sequence[str] | None,
) -> "list[Question]":
    from moellava.data.readers import read_rows
    from moellava.eval.questions import known_groups, questions_of

    rows = read_rows(data, images=images, split=split, language=language, class_names=class_names)
    if group_by is not None:
        known_groups(rows, group_by)
    return list(questions_of(rows, root=rows.image_root, group_by=group_by))


def _say_counts(scores: Any) -> None:
    """What the table does not show: a reader must not take part of the rows for all."""
    judge = scores.get("judge") or {"metrics": {}}
    for metric, found in judge["metrics"].items():
        typer.echo(f"judge {judge['model']}: {metric} {100 * found['value']:.1f}, n {found['n']}")
    join = scores.get("join") or {}
    counts = {
        "answers were cut at the most new tokens": scores["cut_answers"] or 0,
        "answers are empty": scores["empty_answers"],
        "predictions have no truth, and are not scored": len(scores["empty_truth"]),
        "predictions have no row in the data, and are not scored": len(join.get("without_row", [])),
        "rows have no prediction, and are not scored": len(join.get("without_prediction", [])),
    }
    for text, count in counts.items():
        if count:
            typer.echo(f"{count:,} {text}")
    for name, count in scores["groups_not_scored"].items():
        typer.echo(f"the group {name} has {count:,} values: it is not scored by value")
    if scores["num_images_seen"] is not None:
        told = f"the model was given {scores['num_images_seen']:,} images"
        typer.echo(f"{told} for {scores['num_questions']:,} questions")
    if scores["uses_gold_type"]:
        typer.echo("the prompt uses the gold answer's type")
