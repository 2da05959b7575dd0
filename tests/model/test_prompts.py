"""Turns → the prompt: the processor's ids, each picture's place, its embeddings once."""

import pytest
import torch

from moellava.model.prompts import (
    count_tokens,
    encode_pictures,
    pictures_after,
    require_question,
    write_prompt,
)
from moellava.model.turns import read_message, with_images


def message(images, text="Which organ is shown?"):
    items = [{"type": "image", "image": image} for image in images]
    return {"role": "user", "content": [*items, {"type": "text", "text": text}]}


def test_ids_are_those_of_the_processor(loaded, images):
    turns = [read_message(loaded.processor, message(images[:2]))]
    prompt = write_prompt(loaded.processor, turns)
    messages, pictures = with_images("Which organ is shown?", images[:2], {})
    text = loaded.processor.apply_chat_template(
        messages, add_generation_prompt=True, tokenize=False
    )
    assert prompt.ids == loaded.processor(text=text, images=pictures)["input_ids"][0]
    assert count_tokens(loaded, turns) == len(prompt.ids)


def test_each_placeholder_is_keyed_by_its_picture(loaded, images):
    turns = [read_message(loaded.processor, message(images[:2]))]
    prompt = write_prompt(loaded.processor, turns)
    first, second = prompt.pictures
    assert [prompt.keys.count(picture) for picture in (first, second)] == [
        loaded.processor.num_image_tokens
    ] * 2
    assert pictures_after(prompt, prompt.keys.index(second)) == [second]
    assert pictures_after(prompt, 0) == [first, second]


def test_a_picture_is_encoded_once(loaded, images, monkeypatch):
    pictures = read_message(loaded.processor, message(images[:2])).pictures
    encode_pictures(loaded.model, [pictures[0]])
    kept = pictures[0].embeds
    encode_pictures(loaded.model, [*pictures, pictures[1]])
    assert pictures[0].embeds is kept
    expected = loaded.model.get_image_features(
        pictures[1].inputs["pixel_values"], return_dict=True
    ).pooler_output
    assert torch.equal(pictures[1].embeds[0], expected[0])
    monkeypatch.setattr(loaded.model, "get_image_features", None)
    encode_pictures(loaded.model, pictures)


def test_the_image_token_in_a_text_is_refused(loaded, images):
    turns = [read_message(loaded.processor, message(images[:1], "What is <image>?"))]
    with pytest.raises(ValueError, match="The prompt has 2 times <image> for 1 images"):
        write_prompt(loaded.processor, turns)


def test_only_a_question_is_answered(loaded):
    said = read_message(loaded.processor, {"role": "assistant", "content": "A CT."})
    for turns in ([], [said]):
        with pytest.raises(ValueError, match="The last message is not the user's"):
            require_question(turns)
