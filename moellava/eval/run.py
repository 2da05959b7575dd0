"""A checkpoint and a data set in, scores with intervals out: `evaluate`."""

import hashlib
import platform
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path

import torch
import transformers
from PIL import Image

import moellava
from moellava.data.readers import Rows, read_rows
from moellava.data.rows import Row, Turn
from moellava.eval.answer_file import AnswerFile
from moellava.eval.asking import Answered, Asked, Asker
from moellava.eval.baselines import BASELINES, BLANK, MOST_FREQUENT, most_frequent
from moellava.eval.leaks import leaked_questions
from moellava.eval.option_tokens import YES_NO
from moellava.eval.predictions import Prediction, read_predictions
from moellava.eval.prompts import Prompt, find_prompt
from moellava.eval.questions import Question, known_groups, questions_of
from moellava.eval.results import write_results
from moellava.eval.settings import EvaluationSettings
from moellava.images import load_image
from moellava.model.builder_enhanced import load_pretrained_model
from moellava.model.load_options import default_device
from moellava.model.loaded_model import LoadedModel
from moellava.storage.weights import weights_fingerprint

DataSource = str | Path | Sequence[Row]

_BLANK_SIZE = (64, 64)


def evaluate(
    checkpoint: str | Path | LoadedModel,
    data: DataSource,
    out: str | Path,
    settings: EvaluationSettings | None = None,
    *,
    split: str | None = None,
    images: str | Path | None = None,
    language: str | None = None,
    train: DataSource | None = None,
    leaks: DataSource | None = None,
) -> dict[str, object]:
    """Ask a model every question of a data set and score its answers.

    `out` gets `predictions.jsonl`, which grows as it goes and from which a run that was killed
    carries on, `scores.json` and `report.html`; the baselines' predictions lie in `out/baselines`.

    Args:
        checkpoint: a folder, a hub id, or a model that is loaded.
        data: what `read_rows` reads, or rows.
        split, images, language: of data that is read.
        train: the training split, for the most frequent answers; without it, those of `data` count.
        leaks: a training set; the scores are also given without the rows whose images it has.

    Returns:
        The content of `scores.json`.

    Raises:
        ValueError: no row has an answer, an unknown name, a checkpoint without an image encoder, a
            prompt beyond the context, or a folder with answers of other settings.
    """
    settings = settings or EvaluationSettings()
    asked = _read(data, settings, split, images, language)
    counted = asked.questions
    if train is not None:
        counted = list(questions_of(_rows(train, images=images)))
    leaked = None
    if leaks is not None:
        training_rows = _rows(leaks, images=images)
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
        main,
        scorers=settings.scorers,
        group_by=settings.group_by,
        baselines=baselines,
        num_resamples=settings.num_resamples,
        leaked=leaked,
        facts=facts,
        load_image=asked.load,
    )


@dataclass
class _Data:
    """The rows, and what is asked about them; an image is read when it is needed."""

    rows: Sequence[Row]
    name: str
    root: Path | None
    questions: list[Question]
    without_truth: list[str]
    places: dict[str, tuple[int, int]] = field(default_factory=dict)  # image → row, number there

    def __post_init__(self) -> None:
        for question in self.questions:
            for number, name in enumerate(question.image_names):
                self.places.setdefault(name, (question.row_number, number))

    def load(self, name: str) -> Image.Image:
        if name == BLANK:
            return Image.new("RGB", _BLANK_SIZE)
        row, number = self.places[name]
        return load_image(self.rows[row].images[number])

    def fingerprint(self) -> str:
        """SHA-256 over the questions, truths and image names."""
        digest = hashlib.sha256()
        for one in self.questions:
            turns = [(turn.role, turn.text) for turn in one.turns]
            told = (one.id, turns, one.truth, one.answer_type, one.options, one.image_names)
            digest.update(repr(told).encode())
        return digest.hexdigest()


class _Run:
    """One model and one data set, asked once for the scores and once for each baseline."""

    def __init__(self, loaded: LoadedModel, data: _Data, out: Path, settings: EvaluationSettings):
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
                _prediction(questions[one.id], asked[one.id], one, self.prompt) for one in batch
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
                changed = BASELINES[baseline](question, names)
                if changed is None:
                    raise ValueError(
                        f"The baseline {baseline} needs two different images; {self.data.name} has "
                        f"{len(names)}. Leave it out."
                    )
                turns, images = changed
            yield Asked(
                id=question.id,
                turns=_prompted(turns, question, self.prompt),
                images=images,
                options=_options(question),
            )


def _rows(data: DataSource, **options: str | Path | None) -> Sequence[Row]:
    if not isinstance(data, str | Path):
        return data
    given = {name: value for name, value in options.items() if value is not None}
    return read_rows(data, **given)  # type: ignore[arg-type]  # each option has its own type


def _read(
    data: DataSource,
    settings: EvaluationSettings,
    split: str | None,
    images: str | Path | None,
    language: str | None,
) -> _Data:
    rows = _rows(data, split=split, images=images, language=language)
    root = rows.image_root if isinstance(rows, Rows) else None
    name = rows.source if isinstance(rows, Rows) else f"{len(rows)} rows"
    if settings.group_by is not None:
        known_groups(rows, settings.group_by)
    found = questions_of(rows, root=root, group_by=settings.group_by)
    questions = list(islice(found, settings.limit))
    without = [row.id for row in rows if row.answer is None]
    if not questions:
        raise ValueError(
            f"{name}: none of {len(rows)} rows has an answer to compare with. Give data that has."
        )
    return _Data(rows, name, root, questions, without)


def _load(checkpoint: str | Path | LoadedModel, settings: EvaluationSettings) -> LoadedModel:
    if isinstance(checkpoint, LoadedModel):
        return checkpoint
    return load_pretrained_model(
        checkpoint,
        device=settings.device or default_device(),
        dtype=settings.dtype,
        progress=settings.progress,
    )


def _options(question: Question) -> tuple[str, ...]:
    """Whose probabilities are wanted: the stated options, or yes and no for a closed question."""
    if question.options:
        letters = tuple(chr(ord("A") + number) for number in range(len(question.options)))
        lists_letters = all(f"{letter}:" in question.text for letter in letters)
        return letters if lists_letters else question.options
    return YES_NO if question.answer_type == "closed" else ()


def _prompted(turns: Sequence[Turn], question: Question, prompt: Prompt) -> tuple[Turn, ...]:
    """The conversation with the prompt's words in its last turn."""
    last = turns[-1]
    text = prompt.write(last.text, question.truth, question.answer_type)
    return (*turns[:-1], Turn(last.role, text))


def _prediction(question: Question, asked: Asked, answered: Answered, prompt: Prompt) -> Prediction:
    return Prediction(
        id=question.id,
        images=question.image_names,
        question=question.text,
        prompt=prompt.name,
        answer=answered.text,
        truth=question.truth,
        answer_type=question.answer_type,
        answer_type_from=question.answer_type_from,
        options=question.options,
        groups=question.groups,
        num_tokens=answered.num_tokens,
        seconds=answered.seconds,
        is_cut=answered.is_cut,
        num_images_seen=len(asked.images),
        probabilities=answered.probabilities,
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
