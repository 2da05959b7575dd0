import numpy as np
import pytest

from moellava.data.rows import Row, RowError, Turn, checked


def row(*texts: str, images=(), roles=("user", "assistant")) -> Row:
    turns = tuple(Turn(roles[number % len(roles)], text) for number, text in enumerate(texts))
    return Row(id="r", images=tuple(images), turns=turns)


def test_images_keep_their_places_in_the_messages():
    asked = row("Compare <image>\nwith <image>\n, please.", "Alike.", images=["a.png", "b.png"])
    assert asked.messages() == [
        {
            "role": "user",
            "content": [
                {"type": "text", "text": "Compare "},
                {"type": "image", "image": "a.png"},
                {"type": "text", "text": "with "},
                {"type": "image", "image": "b.png"},
                {"type": "text", "text": ", please."},
            ],
        },
        {"role": "assistant", "content": "Alike."},
    ]


def test_messages_of_several_turns_take_the_images_in_order():
    chat = row("<image>\nWhat?", "A.", "And <image>", "B.", images=["a.png", "b.png"])
    assert chat.messages()[0]["content"][0] == {"type": "image", "image": "a.png"}
    assert chat.messages()[2]["content"][1] == {"type": "image", "image": "b.png"}


def test_the_template_writes_what_llavas_text_says(hub_cache):
    """The newline behind a mark is the template's own, so that it stands there once."""
    from transformers import AutoTokenizer

    from moellava.model.chat_templates import TINYLLAMA
    from moellava.testing import TINYLLAMA as NAME

    tokenizer = AutoTokenizer.from_pretrained(NAME)
    text = tokenizer.apply_chat_template(
        row("<image>\nWhy?", "No.", images=["a.png"]).messages(),
        chat_template=TINYLLAMA,
        tokenize=False,
    )
    assert text == "<|user|>\n<image>\nWhy?</s>\n<|assistant|>\nNo.</s>\n"


def test_question_and_answer_leave_the_marks_out():
    asked = row("<image>\nWhy?", "No.", images=["a.png"])
    assert (asked.question, asked.answer) == ("Why?", "No.")
    assert row("Why?").answer is None


def test_a_row_prints_short():
    shown = repr(row("<image> Why?", "No.", images=[b"x" * 10_000]))
    assert "<10000 bytes>" in shown
    assert len(shown) < 200
    assert repr(row("<image> Why?", images=[np.zeros(2)])).startswith("Row(images=(array(")


@pytest.mark.parametrize(
    ("broken", "kind", "message"),
    [
        (row(), "malformed", "no turns"),
        (row("Why?", " \n"), "empty turn", r"turn 1 \(assistant\) is empty"),
        (
            row("Why?", "No.", roles=("assistant", "user")),
            "malformed",
            "assistant comes where user should",
        ),
        (
            row("Why?", "How?", roles=("user", "user")),
            "malformed",
            "user comes where assistant should",
        ),
        (row("<image> Why?", "No."), "placeholder mismatch", "1 <image> marks for 0 images"),
        (row("Why?", "No.", images=["a"]), "placeholder mismatch", "0 <image> marks for 1 images"),
        (
            row("Why?", "See <image>", images=["a"]),
            "placeholder mismatch",
            r"turn 1 \(assistant\) has <image>",
        ),
        (row("Why?", "Be kind.", roles=("user", "system")), "malformed", "turn 1 is a system turn"),
    ],
)
def test_rows_that_cannot_be_used_say_why(broken, kind, message):
    with pytest.raises(RowError, match=message) as error:
        checked(broken)
    assert error.value.kind == kind


def test_an_image_alone_and_a_system_turn_are_fine():
    checked(row("<image>", "A chest.", images=["a"]))
    checked(row("Be kind.", "Why?", "No.", roles=("system", "user", "assistant")))


def test_half_of_a_surrogate_pair_is_not_text():
    """JSON can spell it, and a tokenizer fails on it in the middle of a training."""
    with pytest.raises(RowError, match=r"turn 1 \(assistant\) has half of a surrogate pair"):
        checked(row("Why?", "No \ud83d."))
