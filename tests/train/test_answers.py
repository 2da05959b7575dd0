"""Held-out rows are asked in the format that they are trained in."""

import pytest

from moellava.data import Row, Turn
from moellava.model.builder_enhanced import load_pretrained_model
from moellava.train import load_recipe
from moellava.train.answers import answer_rows, share_exact
from moellava.train.batches import build_collator
from tests.train.tiny import parts_of


def row(name: str, question: str, answer: str, *images: str) -> Row:
    turns = (Turn("user", question), Turn("assistant", answer), Turn("user", "Sure?"))
    return Row(id=name, images=images, turns=(*turns, Turn("assistant", "Yes.")))


@pytest.fixture(scope="module")
def asked(tiny):
    loaded = load_pretrained_model(parts_of(tiny), dtype="float32")
    rows = [
        row("a", "<image>\nIs this a CT image?", "yes", str(tiny / "images" / "1.png")),
        row("b", "What is a CT?", "A scan."),
        row("c", "<image>\nWhy?", "Because.", str(tiny / "images" / "2.png")),
    ]
    recipe = load_recipe("stage3_experts", ["data.chat_template=null"])
    return loaded, rows, build_collator(recipe, loaded.processor)


def test_they_are_what_answer_says_to_the_first_question(asked):
    loaded, rows, collator = asked
    found = answer_rows(loaded, rows, collator, max_new_tokens=6, batch_size=2)
    assert [item["id"] for item in found] == ["a", "b", "c"]
    assert [item["truth"] for item in found] == ["yes", "A scan.", "Because."]
    questions = ["Is this a CT image?", "What is a CT?", "Why?"]
    images = [list(row.images) or None for row in rows]
    assert [item["answer"] for item in found] == [
        loaded.answer([image], [question], max_new_tokens=6)[0]
        for image, question in zip(images, questions, strict=True)
    ]


@pytest.mark.parametrize("training", [True, False])
def test_the_models_mode_is_left_as_it_was(asked, training):
    loaded, rows, collator = asked
    loaded.model.train(training)
    answer_rows(loaded, rows[:1], collator, max_new_tokens=1)
    assert loaded.model.training is training


def test_the_share_of_exact_answers():
    pairs = [("yes", "yes"), ("Yes.", "yes"), ("normal", "no"), ("", "no")]
    answers = [{"id": 0, "question": "?", "answer": a, "truth": t} for a, t in pairs]
    assert share_exact(answers) == 0.5
