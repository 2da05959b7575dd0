import numpy as np
import pytest
from PIL import Image

from moellava.data import Row, Turn
from moellava.eval.questions import image_name, known_groups, questions_of


def row(row_id, *turns, images=(), **more):
    roles = ("user", "assistant") * len(turns)
    said = tuple(Turn(role, text) for role, text in zip(roles, turns, strict=False))
    return Row(id=row_id, images=images, turns=said, **more)


def test_each_answer_of_a_conversation_is_a_question_with_the_true_turns_before_it():
    asked = row(
        "7", "<image>\nCT?", "yes", "And <image>?", "left", images=("a.png", "b.png"),
        answer_type="CLOSED", choices=("x", "y"),
    )  # fmt: skip
    first, second = questions_of([asked])
    assert (first.id, first.text, first.truth) == ("7", "CT?", "yes")
    assert (first.answer_type, first.answer_type_from, first.options) == (
        "closed",
        "data",
        ("x", "y"),
    )
    assert first.image_names == ("a.png",)
    assert (second.id, second.text, second.truth) == ("7#2", "And ?", "left")
    assert second.image_names == ("a.png", "b.png")
    assert [turn.text for turn in second.turns] == ["<image>\nCT?", "yes", "And <image>?"]
    assert second.answer_type_from != "data"


def test_rows_of_one_id_are_told_apart_by_their_number():
    rows = [row("a", "Q?", "yes"), row("b", "Q?", "no"), row("a", "R?", "no")]
    assert [question.id for question in questions_of(rows)] == ["a@0", "b", "a@2"]


def test_a_row_without_an_answer_has_no_question():
    assert list(questions_of([row("a", "Q?")])) == []


def test_groups_are_the_known_fields_or_those_asked_for():
    asked = row("a", "Q?", "yes", extra={"modality": "CT", "site": 3, "boxes": [1]})
    [question] = questions_of([asked])
    assert question.groups == {"modality": "CT"}
    [question] = questions_of([asked], group_by=["site"])
    assert question.groups == {"site": "3"}


def test_an_unknown_group_suggests_the_nearest_field():
    rows = [row("a", "Q?", "yes", extra={"modality": "CT"})]
    known_groups(rows, ["modality"])
    with pytest.raises(ValueError, match=r"Unknown group 'modalty'\. Did you mean 'modality'"):
        known_groups(rows, ["modalty"])


def test_names_of_images(tmp_path):
    assert image_name(str(tmp_path / "x" / "a.png"), tmp_path) == "x/a.png"
    assert image_name("/elsewhere/a.png", tmp_path) == "/elsewhere/a.png"
    assert image_name(b"one") == image_name(b"one") != image_name(b"two")
    grey = np.zeros((4, 4), np.uint8)
    assert image_name(grey) == image_name(grey.copy()) != image_name(grey + 1)
    assert image_name(Image.fromarray(grey)) != image_name(Image.fromarray(grey).convert("1"))
