"""Scorers as rewards of TRL's signature: `scorer_reward`, `strict_reward`, `format_reward`."""

import re
from collections.abc import Mapping, Sequence
from typing import Protocol

from moellava.eval.answer_types import decide_answer_type
from moellava.eval.scorers import find_scorers

# A text, or the messages of a conversational data set.
Completion = str | Sequence[Mapping[str, object]]

_FORMAT = re.compile(r"\s*<think>.*?</think>\s*<answer>(.*?)</answer>\s*", re.DOTALL)


class Reward(Protocol):
    def __call__(self, completions: Sequence[Completion], **columns: object) -> list[float]: ...


def scorer_reward(name: str, metric: str = "accuracy", fallback: str = "open_f1") -> Reward:
    """A reward that is a scorer's metric of each completion.

    The data set needs a column `truth`, and may have `answer_type` and `options`. What an
    `<answer>` holds counts, else the whole completion.

    Args:
        metric: for closed questions and choices.
        fallback: for open questions, which are seldom right word for word.

    Raises:
        ValueError: an unknown scorer.
    """
    [scorer] = find_scorers([name])

    def reward(completions: Sequence[Completion], **columns: object) -> list[float]:
        truths = _column(columns, "truth", len(completions))
        types = _column(columns, "answer_type", len(completions))
        options = _column(columns, "options", len(completions))
        rewards = []
        for completion, truth, given, stated in zip(
            completions, truths, types, options, strict=True
        ):
            if truth is None:
                raise ValueError("The data set has no column 'truth' to compare answers with.")
            choices = tuple(map(str, stated)) if isinstance(stated, list | tuple) else ()
            answer_type, _ = decide_answer_type(
                None if given is None else str(given), str(truth), choices
            )
            scored = scorer.score(
                _answer(completion), str(truth), answer_type=answer_type, options=choices
            )
            names = (fallback, metric) if answer_type == "open" else (metric, fallback)
            rewards.append(next((scored[one] for one in names if one in scored), 0.0))
        return rewards

    reward.__name__ = f"{name}_reward"  # TRL logs it
    return reward


def format_reward(completions: Sequence[Completion], **columns: object) -> list[float]:
    """1 for a completion that is `<think>...</think><answer>...</answer>`, else 0."""
    return [float(_FORMAT.fullmatch(_text(completion)) is not None) for completion in completions]


strict_reward = scorer_reward("strict")
mcq_reward = scorer_reward("mcq", metric="choice_accuracy")


def _column(columns: Mapping[str, object], name: str, length: int) -> Sequence[object]:
    found = columns.get(name)
    return found if isinstance(found, list | tuple) else [None] * length


def _text(completion: Completion) -> str:
    if isinstance(completion, str):
        return completion
    return "".join(str(message.get("content") or "") for message in completion)


def _answer(completion: Completion) -> str:
    text = _text(completion)
    tagged = re.findall(r"<answer>(.*?)</answer>", text, re.DOTALL)
    return str(tagged[-1]).strip() if tagged else text
