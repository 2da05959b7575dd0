"""Scores of single answers: `is_exact_answer`, the one rule for "the same answer"."""


def is_exact_answer(answer: str, truth: str) -> bool:
    """Whether two answers are the same words, whatever their case and final periods."""
    return _plain(answer) == _plain(truth)


def _plain(text: str) -> str:
    return text.strip().rstrip(". \n").strip().casefold()
