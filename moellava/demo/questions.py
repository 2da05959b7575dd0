"""Questions about a modality, in several wordings, with their answers."""

from dataclasses import dataclass

import numpy as np
from PIL import Image

from moellava.demo.images import MODALITIES, Source, sample_crops

WHICH = ("What modality is this?", "Which kind of image is shown?", "What type of image is this?")
_NAMES = {
    "CT": "a CT image",
    "MR": "an MR image",
    "ultrasound": "ultrasound",
    "histology": "histology",
    "retina photograph": "a retina photograph",
    "cell microscopy": "cell microscopy",
}
WHETHER = ("Is this {}?", "Does the picture show {}?", "Would you call this {}?")


@dataclass(frozen=True)
class Example:
    """One question about one image."""

    image: Image.Image
    source: str
    modality: str
    question: str
    answer: str


def make_examples(
    sources: list[Source], split: str, num_per_modality: int, seed: int
) -> list[Example]:
    """Per crop an open question, one whose answer is yes, and one whose answer is no."""
    rng = np.random.default_rng(seed)
    examples = []
    for source, image in sample_crops(sources, split, num_per_modality, seed):
        wrong = str(rng.choice([name for name in MODALITIES if name != source.modality]))
        for question, answer in (
            (str(rng.choice(WHICH)), source.modality),
            (str(rng.choice(WHETHER)).format(_NAMES[source.modality]), "yes"),
            (str(rng.choice(WHETHER)).format(_NAMES[wrong]), "no"),
        ):
            examples.append(Example(image, source.name, source.modality, question, answer))
    return examples


def corpus() -> list[str]:
    """All sentences of the demo, for its tokenizer."""
    whether = [wording.format(name) for wording in WHETHER for name in _NAMES.values()]
    roles = ["<|system|>", "<|user|>", "<|assistant|>"]
    return [*WHICH, *whether, *MODALITIES, "yes", "no", *roles]
