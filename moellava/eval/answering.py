"""Questions → what a model is asked, and its answers → predictions: `ask_about`, `predict`."""

from collections.abc import Sequence

from moellava.data.rows import Turn
from moellava.eval.asking import Answered, Asked
from moellava.eval.option_tokens import YES_NO
from moellava.eval.predictions import Prediction
from moellava.eval.prompts import Prompt
from moellava.eval.questions import Question


def ask_about(
    question: Question,
    prompt: Prompt,
    turns: Sequence[Turn] | None = None,
    images: Sequence[str] | None = None,
) -> Asked:
    """A question with the prompt's words in its last turn.

    Args:
        turns, images: of a baseline, in place of the question's own.
    """
    turns = question.turns if turns is None else turns
    last = turns[-1]
    text = prompt.write(last.text, question.truth, question.answer_type)
    return Asked(
        id=question.id,
        turns=(*turns[:-1], Turn(last.role, text)),
        images=question.image_names if images is None else tuple(images),
        options=_options(question),
    )


def predict(question: Question, asked: Asked, answered: Answered, prompt: Prompt) -> Prediction:
    """What is known about an answer, as a line of `predictions.jsonl` has it."""
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


def true_prediction(question: Question) -> Prediction:
    """The prediction of a model that knows: what the question's scores are scored by."""
    return Prediction(
        id=question.id,
        images=question.image_names,
        question=question.text,
        answer=question.truth,
        truth=question.truth,
        answer_type=question.answer_type,
        answer_type_from=question.answer_type_from,
        options=question.options,
        groups=question.groups,
    )


def _options(question: Question) -> tuple[str, ...]:
    """Whose probabilities are wanted: the stated options, or yes and no for a closed question."""
    if question.options:
        letters = tuple(chr(ord("A") + number) for number in range(len(question.options)))
        lists_letters = all(f"{letter}:" in question.text for letter in letters)
        return letters if lists_letters else question.options
    return YES_NO if question.answer_type == "closed" else ()
