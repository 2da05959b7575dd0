"""A checkpoint and a data set in, scores with intervals out: `evaluate`."""

import platform
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import torch
import transformers

import moellava
from moellava.eval.answer_file import AnswerFile
from moellava.eval.answering import ask_about, predict
from moellava.eval.asking import Answered, Asked, Asker
from moellava.eval.baselines import BASELINES, MOST_FREQUENT, changed_question, most_frequent
from moellava.eval.evaluation_data import DataSource, EvaluationData, read_evaluation_data, rows_of
from moellava.eval.leaks import leaked_questions
from moellava.eval.predictions import read_predictions
from moellava.eval.prompts import find_prompt
from moellava.eval.questions import Question, questions_of
from moellava.eval.results import write_results
from moellava.eval.settings import EvaluationSettings
from moellava.model.builder_enhanced import load_pretrained_model
from moellava.model.load_options import default_device
from moellava.model.loaded_model import LoadedModel
from moellava.storage.weights import weights_fingerprint


def evaluate(
    checkpoint: str | Path | LoadedModel,
    data: DataSource,
    out: str | Path,
    settings: EvaluationSettings | None = None,
    *,
    split: str | None = None,
    images: str | Path | None = None,
    language: str | None = None,
    class_names: Sequence[str] | None = None,
    train: DataSource | None = None,
    leaks: DataSource | None = None,
    train_split: str | None = None,
) -> dict[str, object]:
    """Ask a model every question of a data set and score its answers.

    `out` gets `predictions.jsonl`, which grows as it goes and from which a run that was killed
    carries on, `scores.json` and `report.html`; the baselines' predictions lie in `out/baselines`.

    Args:
        checkpoint: a folder, a hub id, or a model that is loaded.
        data: what `read_rows` reads, or rows.
        split, images, language, class_names: of data that is read, see `read_rows`.
        train: the training split, for the most frequent answers; without it, those of `data` count.
        leaks: a training set; the scores are also given without the rows whose images it has.
        train_split: of `train` and `leaks`, if they have several.

    Returns:
        The content of `scores.json`.

    Raises:
        ValueError: no row has an answer, an unknown name, a checkpoint without an image encoder, a
            prompt beyond the context, or a folder with answers of other settings.
    """
    settings = settings or EvaluationSettings()
    asked = read_evaluation_data(
        data,
        split=split,
        images=images,
        language=language,
        class_names=class_names,
        group_by=settings.group_by,
        limit=settings.limit,
    )
    counted = asked.questions
    read_as = {"images": images, "language": language, "class_names": class_names}
    if train is not None:
        counted = list(questions_of(rows_of(train, split=train_split, **read_as)))
    leaked = None
    if leaks is not None:
        training_rows = rows_of(leaks, split=train_split, **read_as)
        leaked = leaked_questions(asked.questions, asked.rows, training_rows, root=asked.root)
    run = _Run(_load(checkpoint, settings), asked, Path(out), settings)
    main = run.answer("predictions.jsonl", None)
    baselines = run.answer_baselines(main, counted)
    facts: dict[str, object] = {
        "checkpoint": "a loaded model" if isinstance(checkpoint, LoadedModel) else str(checkpoint),
        "data": asked.name,
        "split": split,
        "most_frequent_from": "the evaluated data" if train is None else "the training split",
        "without_truth": asked.without_truth,
        **run.facts(),
    }
    return write_results(
        Path(out),
        list(read_predictions(main)),
        scorers=settings.scorers,
        group_by=settings.group_by,
        baselines=baselines,
        num_resamples=settings.num_resamples,
        leaked=leaked,
        facts=facts,
        load_image=asked.load,
    )


class _Run:
    """One model and one data set, asked once for the scores and once for each baseline."""

    def __init__(
        self, loaded: LoadedModel, data: EvaluationData, out: Path, settings: EvaluationSettings
    ):
        self.loaded, self.data, self.out, self.settings = loaded, data, out, settings
        self.prompt = find_prompt(settings.prompt)
        self.fingerprints = {
            "checkpoint": weights_fingerprint(loaded.model.state_dict()),
            "data": data.fingerprint(),
        }
        self.asker = Asker(
            loaded,
            data.load,
            max_new_tokens=settings.max_new_tokens,
            batch_size=settings.batch_size,
        )

    def answer(self, name: str, baseline: str | None) -> Path:
        """Ask every question, or what the baseline makes of it; returns the file of predictions."""
        asked = {one.id: one for one in self._asked(baseline)}
        file = AnswerFile(
            self.out / name,
            {
                "fingerprints": self.fingerprints,
                "baseline": baseline,
                "prompt": self.prompt.name,
                "max_new_tokens": self.settings.max_new_tokens,
                "dtype": str(self.loaded.model.dtype),
            },
        )
        waiting = [one for row_id, one in asked.items() if row_id not in file.done]
        self.asker.check(waiting)
        questions = {question.id: question for question in self.data.questions}
        for batch in _with_progress(
            self.asker.ask(waiting), len(asked), len(file.done), name, self.settings.progress
        ):
            file.append(
                predict(questions[one.id], asked[one.id], one, self.prompt) for one in batch
            )
        file.finish(list(questions))
        return file.path

    def answer_baselines(self, main: Path, counted: Iterable[Question]) -> dict[str, Path]:
        """The files of predictions of the baselines that the settings name."""
        wanted = self.settings.baselines
        found = {
            name: self.answer(f"baselines/{name}.jsonl", name)
            for name in wanted
            if name in BASELINES
        }
        if MOST_FREQUENT in wanted:
            found[MOST_FREQUENT] = self.count_most_frequent(main, counted)
        return found

    def count_most_frequent(self, main: Path, counted: Iterable[Question]) -> Path:
        """Write the predictions of the baseline that asks nobody."""
        known = [(one.answer_type, one.text, one.truth) for one in counted]
        path = self.out / "baselines" / f"{MOST_FREQUENT}.jsonl"
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("w", encoding="utf-8") as file:
            for prediction in most_frequent(read_predictions(main), known):
                file.write(f"{prediction.as_line()}\n")
        return path

    def facts(self) -> dict[str, object]:
        """What `scores.json` says about how the answers were made."""
        return {
            "fingerprints": self.fingerprints,
            "decoding": {
                "do_sample": False,
                "max_new_tokens": self.settings.max_new_tokens,
                "batch_size": self.settings.batch_size,
                "dtype": str(self.loaded.model.dtype),
                "device": str(self.loaded.model.device),
            },
            "versions": {
                "moellava": moellava.__version__,
                "torch": torch.__version__,
                "transformers": transformers.__version__,
                "python": platform.python_version(),
            },
        }

    def _asked(self, baseline: str | None) -> Iterator[Asked]:
        names = list(self.data.places)
        for question in self.data.questions:
            turns, images = question.turns, question.image_names
            if baseline is not None:
                turns, images = changed_question(baseline, question, names, self.data.name)
            yield ask_about(question, self.prompt, turns, images)


def _load(checkpoint: str | Path | LoadedModel, settings: EvaluationSettings) -> LoadedModel:
    if isinstance(checkpoint, LoadedModel):
        return checkpoint
    return load_pretrained_model(
        checkpoint,
        device=settings.device or default_device(),
        dtype=settings.dtype,
        progress=settings.progress,
    )


def _with_progress(
    batches: Iterator[list[Answered]], total: int, done: int, name: str, is_shown: bool
) -> Iterator[list[Answered]]:
    if not is_shown:
        yield from batches
        return
    from tqdm.auto import tqdm

    with tqdm(total=total, initial=done, desc=Path(name).stem, unit="question") as bar:
        for batch in batches:
            yield batch
            bar.update(len(batch))
