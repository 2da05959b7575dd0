"""The demo's questions are true of their crops."""

import pytest

from moellava.demo.images import MODALITIES, load_sources
from moellava.demo.questions import WHICH, corpus, make_examples


@pytest.fixture(scope="module")
def examples():
    return make_examples(load_sources(), "train", 3, seed=0)


def test_each_crop_has_an_open_question_a_yes_and_a_no(examples):
    assert len(examples) == 3 * 3 * len(MODALITIES)
    for first in range(0, len(examples), 3):
        which, yes, no = examples[first : first + 3]
        assert which.image is yes.image is no.image
        assert which.question in WHICH
        assert which.answer == which.modality
        assert (yes.answer, no.answer) == ("yes", "no")


def test_yes_names_the_modality_and_no_another(examples):
    for example in examples:
        named = [name for name in MODALITIES if name in example.question]
        if example.answer == "yes":
            assert named == [example.modality]
        elif example.answer == "no":
            assert len(named) == 1
            assert named != [example.modality]


def test_the_tokenizer_has_read_every_sentence(examples):
    assert {word for example in examples for word in (example.question, example.answer)} <= set(
        corpus()
    )
