"""What lmms-eval asks of a record, and how it scores an answer; the task files name these.

A record has the columns image, question, answer, or those of `moellava data convert X.parquet`.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import cast

from PIL import Image

from moellava.data.formats import find_format
from moellava.data.layouts import Context
from moellava.data.rows import IMAGE_TOKEN, Row
from moellava.eval.questions import Question, questions_of
from moellava.eval.scorers import find_scorers
from moellava.images import load_image

SCORERS = (
    "strict",
    "llava_med",
    "med_moe",
    "med_moe_normalized",
    "medevalkit",
    "slake_exact",
    "token_f1",
    "mcq",
)

Document = Mapping[str, object]
Wording = Mapping[str, str]


def doc_to_visual(doc: Document) -> list[Image.Image]:
    """The pictures, 8-bit RGB."""
    return [load_image(image) for image in _row(doc).images]


def doc_to_text(doc: Document, lmms_eval_specific_kwargs: Wording | None = None) -> str:
    """The question between the task's `pre_prompt` and `post_prompt`."""
    wording = lmms_eval_specific_kwargs or {}
    text = _question(doc).turns[-1].text.replace(f"{IMAGE_TOKEN}\n", "").replace(IMAGE_TOKEN, "")
    return f"{wording.get('pre_prompt', '')}{text.strip()}{wording.get('post_prompt', '')}"


def doc_to_target(doc: Document) -> str:
    return _question(doc).truth


def process_results(doc: Document, results: Sequence[str]) -> dict[str, float]:
    """Every metric of every rule that applies, as SCORER_METRIC, for lmms-eval to average."""
    question = _question(doc)
    return {
        f"{scorer.name}_{metric}": value
        for scorer in find_scorers(SCORERS)
        for metric, value in scorer.score(
            results[0],
            question.truth,
            answer_type=question.answer_type,
            options=question.options,
        ).items()
    }


def _question(doc: Document) -> Question:
    """The first question of a record, whose answer type is decided as everywhere."""
    return next(questions_of([_row(doc)]))


def _row(doc: Document) -> Row:
    # lmms-eval takes the images out of the records that it scores.
    record = doc if "conversations" in doc else {"image": "taken out", **doc}
    form = find_format("auto", record.keys(), "the task")
    return cast(Row, form.to_row(record, 0, Context(image_root=Path())))
