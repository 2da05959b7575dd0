"""How an answer grows and ends, token by token; the model itself is in test_conversation.py."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moellava.model.builder_enhanced import load_tokenizer
from moellava.model.chat_templates import TEMPLATES, multimodal_chat_template
from moellava.model.generation import GrowingAnswer, require_room, turn_end_options
from moellava.testing import SMOLLM2, TINYLLAMA


@pytest.fixture(scope="module", params=[TINYLLAMA, SMOLLM2])
def tokenizer(request, hub_cache):
    return load_tokenizer(request.param)


def grow(tokenizer, ids, **options):
    pieces = []
    answer = GrowingAnswer(
        tokenizer, max_new_tokens=len(ids) + 1, on_piece=pieces.append, **options
    )
    for token in ids:
        answer.add(token)
    answer.finish("length")
    return answer, pieces


# Bytes that are no text together, white space at both ends, words, letters of other scripts.
TEXTS = ["  a  b ", "é€𝄞", "don't , do n't .", "\n\nline\n", "心臓 и сердце", "</s>x", "�"]


@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_pieces_joined_are_the_decoded_tokens(tokenizer, data):
    low = st.integers(0, 400)  # special tokens, bytes, letters
    ids = data.draw(st.lists(low, max_size=24))
    for text in data.draw(st.lists(st.sampled_from(TEXTS), max_size=3)):
        ids += tokenizer(text, add_special_tokens=False)["input_ids"]
    answer, pieces = grow(tokenizer, ids)
    whole = tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
    assert "".join(pieces) == answer.text == whole.strip()


def test_text_is_told_as_it_comes(tokenizer):
    ids = tokenizer("Is there a fracture in the image?", add_special_tokens=False)["input_ids"]
    _, pieces = grow(tokenizer, ids)
    assert len(pieces) > len(ids) / 2


@settings(max_examples=60, deadline=None)
@given(stop=st.text("ab c", min_size=1, max_size=3), text=st.text("ab c", max_size=20))
def test_stop_strings_are_cut_off_and_never_told(tokenizer, stop, text):
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    answer, pieces = grow(tokenizer, ids, stop_strings=[stop])
    decoded = tokenizer.decode(ids)
    assert "".join(pieces) == decoded.partition(stop)[0].strip()
    assert answer.finish_reason == ("stop" if stop in decoded else "length")


def test_an_end_token_ends_and_what_follows_is_padding(tokenizer):
    end = tokenizer.eos_token_id
    ids = tokenizer("yes", add_special_tokens=False)["input_ids"]
    answer, _ = grow(tokenizer, [*ids, end, *ids], end_ids=[end])
    assert (answer.text, answer.finish_reason) == ("yes", "stop")
    assert answer.token_ids == [*ids, end]


def test_the_limit_ends(tokenizer):
    answer = GrowingAnswer(tokenizer, max_new_tokens=2)
    for token in tokenizer("Is there a fracture?", add_special_tokens=False)["input_ids"]:
        answer.add(token)
    assert (len(answer.token_ids), answer.finish_reason) == (2, "length")


def test_a_cancelled_answer_keeps_what_came(tokenizer):
    ids = tokenizer("Is there a fracture?", add_special_tokens=False)["input_ids"]
    answer = GrowingAnswer(tokenizer)
    answer.add(ids[0])
    answer.cancel()
    answer.add(ids[1])
    assert answer.is_done
    assert answer.finish_reason == "cancelled"
    assert answer.token_ids == ids[:1]


class Model:
    def __init__(self, eos_token_id):
        self.generation_config = type("Config", (), {"eos_token_id": eos_token_id})()


class TestEndOfTurn:
    def test_the_models_own_end_token_needs_no_option(self, tokenizer):
        template = multimodal_chat_template(tokenizer)
        assert turn_end_options(Model([tokenizer.eos_token_id]), tokenizer, template) == {}

    def test_a_token_of_the_template_is_a_further_end(self, tokenizer):
        template = TEMPLATES["tinyllama"].replace("eos_token", "'<image>'")
        options = turn_end_options(Model(2), tokenizer, template)
        assert options == {"eos_token_id": [2, tokenizer.convert_tokens_to_ids("<image>")]}

    def test_text_that_is_no_token_is_a_stop_string(self, tokenizer):
        template = TEMPLATES["tinyllama"].replace("eos_token", "'###END'")
        assert turn_end_options(Model(2), tokenizer, template) == {"stop_strings": ["###END"]}


def test_room_counts_what_is_too_much():
    require_room(100, 40, 28, 128, "The prompt")
    message = (
        r"The prompt has 101 tokens \(40 of images, 61 of text\) and max_new_tokens is 28, but the "
        r"context holds 128: 1 tokens would be cut"
    )
    with pytest.raises(ValueError, match=message):
        require_room(101, 40, 28, 128, "The prompt")
