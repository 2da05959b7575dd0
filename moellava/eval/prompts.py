"""What is asked besides the question: `find_prompt` gives a `Prompt`, the same for a whole set."""

from collections.abc import Callable
from dataclasses import dataclass

from moellava.eval.scorers.registry import AnswerType
from moellava.messages import unknown_name

_QUESTION = "{question}"
_SHORT = "Answer the question using a single word or phrase."
_YES_NO = "Answer with yes or no."


@dataclass(frozen=True)
class Prompt:
    """One way to ask.

    Args:
        name: as `--prompt` takes it and `predictions.jsonl` has it; for a free text, the text.
        write: (question, truth, answer type) → what the model reads.
        uses_gold_type: whether the text depends on the truth or its type, which tells the model
            something about the answer.
    """

    name: str
    write: Callable[[str, str, AnswerType], str]
    uses_gold_type: bool = False


def _medevalkit(question: str, truth: str, answer_type: AnswerType) -> str:
    """As MedEvalKit asks: by whether the truth is yes or no."""
    if truth.strip().lower() in ("yes", "no"):
        return f"{question}\nPlease answer 'yes' or 'no' (no extra output)."
    return f"{question}\nPlease answer the question concisely."


def _template(text: str) -> Callable[[str, str, AnswerType], str]:
    return lambda question, truth, answer_type: text.replace(_QUESTION, question)


PROMPTS = {
    prompt.name: prompt
    for prompt in (
        Prompt("none", _template(_QUESTION)),
        Prompt("short", _template(f"{_QUESTION}\n{_SHORT}")),
        Prompt("yes_no_all", _template(f"{_QUESTION}\n{_YES_NO}")),
        Prompt("medevalkit", _medevalkit, uses_gold_type=True),
    )
}


def find_prompt(name: str) -> Prompt:
    """A prompt by its name, or a free text of two words or more.

    A free text stands behind each question, on a line of its own, unless it says where the
    question goes by `{question}`.

    Raises:
        ValueError: a single word that is not a name.
    """
    if name in PROMPTS:
        return PROMPTS[name]
    if _QUESTION in name:
        return Prompt(name, _template(name))
    if len(name.split()) < 2:
        raise unknown_name("prompt", name, PROMPTS)
    return Prompt(name, _template(f"{_QUESTION}\n{name}"))
