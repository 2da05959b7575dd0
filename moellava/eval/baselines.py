"""What a model would answer without the image, and what anybody would: the table `BASELINES`.

| name | asked |
|---|---|
| `blank` | the same question about a black image |
| `other_image` | about an image of another row |
| `no_image` | without an image |
| `most_frequent` | nobody: the most frequent answer to a question of its kind |
"""

from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace

from moellava.data.rows import IMAGE_TOKEN, Turn
from moellava.eval.predictions import Prediction
from moellava.eval.questions import Question

BLANK = "(blank)"  # the name of the black image, which no file can have

Turns = tuple[Turn, ...]
Images = tuple[str, ...]
# (question, all image names) → conversation and images in place of its own, or None if impossible
Change = Callable[[Question, Sequence[str]], tuple[Turns, Images] | None]


def blank(question: Question, names: Sequence[str]) -> tuple[Turns, Images] | None:
    return question.turns, (BLANK,) * len(question.image_names)


def other_image(question: Question, names: Sequence[str]) -> tuple[Turns, Images] | None:
    """Each image becomes the one half the data set further on: far from it, and always the same."""
    if len(names) < 2:
        return None
    step = len(names) // 2
    place = {name: number for number, name in enumerate(names)}
    others = (names[(place[name] + step) % len(names)] for name in question.image_names)
    return question.turns, tuple(others)


def no_image(question: Question, names: Sequence[str]) -> tuple[Turns, Images] | None:
    turns = (Turn(turn.role, _without_marks(turn.text)) for turn in question.turns)
    return tuple(turn for turn in turns if turn.text), ()


# Those that a model answers; most_frequent needs none.
BASELINES: dict[str, Change] = {
    "blank": blank,
    "other_image": other_image,
    "no_image": no_image,
}
MOST_FREQUENT = "most_frequent"
ALL_BASELINES = (*BASELINES, MOST_FREQUENT)


def changed_question(
    baseline: str, question: Question, names: Sequence[str], source: str
) -> tuple[Turns, Images]:
    """The conversation and images that a baseline asks about in place of the question's own.

    Args:
        names: of all images.
        source: of the data, for the message.

    Raises:
        ValueError: the baseline cannot be made of this data.
    """
    changed = BASELINES[baseline](question, names)
    if changed is None:
        raise ValueError(
            f"The baseline {baseline} needs two different images; {source} has {len(names)}. Leave "
            "it out."
        )
    return changed


def most_frequent(
    predictions: Iterable[Prediction], known: Iterable[tuple[str, str, str]]
) -> Iterator[Prediction]:
    """The predictions with the most frequent answer to a question of their kind in place of theirs.

    A kind is an answer type and the question's first word; a kind that is not known gets the most
    frequent answer of its type, then of all. Of equally frequent answers the first in the alphabet
    counts.

    Args:
        known: (answer type, question, truth) to count: of the training split, or of the data
            itself, which makes the baseline stronger than anybody could be.
    """
    counts: dict[tuple[str, ...], Counter[str]] = defaultdict(Counter)
    for answer_type, question, truth in known:
        for kind in _kinds(answer_type, question):
            counts[kind][truth.strip()] += 1
    best = {
        kind: min(found, key=lambda text: (-found[text], text)) for kind, found in counts.items()
    }
    for prediction in predictions:
        kinds = _kinds(prediction.answer_type, prediction.question)
        answer = next((best[kind] for kind in kinds if kind in best), "")
        yield replace(
            prediction,
            answer=answer,
            is_cut=None,
            num_images_seen=None,
            seconds=None,
            num_tokens=None,
            probabilities=None,
        )


def _kinds(answer_type: str, question: str) -> tuple[tuple[str, ...], ...]:
    words = question.lower().split()
    return (answer_type, words[0] if words else ""), (answer_type,), ()


def _without_marks(text: str) -> str:
    return text.replace(f"{IMAGE_TOKEN}\n", "").replace(IMAGE_TOKEN, "").strip()
