"""Which questions are about images that a training set has, too: `leaked_questions`."""

from collections.abc import Iterable, Sequence
from pathlib import Path

from moellava.data.check import MAX_DISTANCE
from moellava.data.fingerprints import Fingerprint, fingerprint, near_pairs
from moellava.data.rows import Row
from moellava.eval.questions import Question, image_name
from moellava.images import ImageLike, map_in_threads

_AT_ONCE = 64  # images in memory


def leaked_questions(
    questions: Iterable[Question],
    rows: Sequence[Row],
    train: Sequence[Row],
    *,
    root: Path | None = None,
    max_distance: int = MAX_DISTANCE,
) -> list[str]:
    """Ids of the questions with an image that is the same in the training set, or nearly.

    The same: equal files or pixels. Nearly: at most `max_distance` of 64 bits of the perceptual
    hashes differ, as `moellava data check --against` tells. Blank images resemble no other.

    Args:
        root: the folder that the questions' image names leave out.
    """
    test_prints = _prints(rows, root)
    train_prints = list(_prints(train, None).values())
    exact = {found.exact for found in train_prints if found.exact}
    leaked = {name for name, found in test_prints.items() if found.exact in exact}

    hashed = [(name, one.perceptual) for name, one in test_prints.items()]
    known = [(name, bits) for name, bits in hashed if bits is not None]
    others = [found.perceptual for found in train_prints if found.perceptual is not None]
    near = near_pairs([bits for _, bits in known], others, max_distance)
    leaked |= {known[number][0] for number, _, _ in near}
    return [question.id for question in questions if leaked & set(question.image_names)]


def _prints(rows: Sequence[Row], root: Path | None) -> dict[str, Fingerprint]:
    """Each distinct image of the rows, by its name, read once and a few at a time."""
    found: dict[str, Fingerprint] = {}
    waiting: dict[str, ImageLike] = {}

    def read_waiting() -> None:
        found.update(zip(waiting, map_in_threads(fingerprint, waiting.values()), strict=True))
        waiting.clear()

    for row in rows:
        for image in row.images:
            name = image_name(image, root)
            if name not in found:
                waiting[name] = image
        if len(waiting) >= _AT_ONCE:
            read_waiting()
    read_waiting()
    return found
