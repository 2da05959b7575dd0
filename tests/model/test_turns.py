"""Images that stand for several pictures, in messages: each becomes an image behind its words."""

from pathlib import Path

import numpy as np
import pytest
import torch
from nibabel.testing import data_path
from pydicom.data import get_testdata_file

from moellava.explain import explain
from moellava.images import image_parts, to_pil
from moellava.model.builder_enhanced import load_pretrained_model
from moellava.model.conversation import Conversation
from moellava.model.turns import expand_images, read_message, with_images
from tests.images.conftest import write_ct

VOLUME = str(Path(data_path) / "anatomical.nii")
CINE = str(get_testdata_file("examples_ybr_color.dcm", download=False))
QUESTION = "Which organ is shown?"
OPTIONS = {"slices": {"num": 3, "plane": "coronal"}, "window": (4000, 8000)}
WORDS = [f"slice {at} of 3, coronal: " for at in (1, 2, 3)]


def told_by_hand():
    """The messages that stand for the volume, written without the option."""
    content = []
    for number, words in zip((6, 20, 34), WORDS, strict=True):
        picture = to_pil(VOLUME, frame=number, plane="coronal", window=(4000, 8000))
        content += [{"type": "text", "text": words}, {"type": "image", "image": picture}]
    return [{"role": "user", "content": [*content, {"type": "text", "text": QUESTION}]}]


def test_slices_are_images_in_order_behind_their_words(loaded):
    messages, pictures = with_images(QUESTION, [VOLUME], OPTIONS)
    expected, by_hand = with_images(told_by_hand(), [], {})
    assert messages == expected
    assert len(pictures) == len(by_hand) == 3
    assert all(map(np.array_equal, pictures, by_hand))
    text = loaded.processor.apply_chat_template(messages, tokenize=False)
    assert "".join(f"{words}<image>\n" for words in WORDS) + QUESTION in text


def test_every_way_to_ask_sees_the_same(loaded):
    expected = loaded.answer(None, told_by_hand(), max_new_tokens=6)[0]
    new = {"max_new_tokens": 6}
    item = {"image": VOLUME, **OPTIONS}
    message = {"role": "user", "content": [{"type": "image", **item}, QUESTION_ITEM]}
    assert loaded.answer(VOLUME, QUESTION, **OPTIONS, **new) == [expected]
    assert loaded.answer(item, QUESTION, **new) == [expected]
    assert loaded.answer(None, [message], **new) == [expected]
    assert loaded.chat([message], **new) == expected
    assert Conversation(loaded).ask(QUESTION, item, **new) == expected
    parts = image_parts(VOLUME, **OPTIONS)
    assert loaded.answer(parts, QUESTION, **new) == [expected]
    assert loaded.answer([VOLUME, VOLUME], [QUESTION] * 2, **OPTIONS, **new) == [expected] * 2


QUESTION_ITEM = {"type": "text", "text": QUESTION}


def test_a_series_and_a_cine_in_one_message(loaded, tmp_path):
    volume = np.random.default_rng(0).integers(0, 3000, (12, 9, 11)).astype(np.int16)
    write_ct(tmp_path, volume)
    content = [
        {"type": "image", "image": str(tmp_path), "slices": 2, "window": "lung"},
        {"type": "image", "image": CINE, "frames": 2},
        {"type": "image", "image": CINE, "frame": 0},
        QUESTION_ITEM,
    ]
    turn = read_message(loaded.processor, {"role": "user", "content": content})
    told = [item if isinstance(item, str) else item.name for item in turn.content]
    assert told == [
        *("slice 1 of 2, axial: ", "021.dcm", "slice 2 of 2, axial: ", "063.dcm"),
        *("frame 1 of 2: ", Path(CINE).name, "frame 2 of 2: ", Path(CINE).name),
        *(Path(CINE).name, QUESTION),
    ]
    assert [picture.view for picture in turn.pictures] == [
        {"window": "lung"},
        {"window": "lung"},
        {"frame": 7},
        {"frame": 22},
        {"frame": 0},
    ]


def test_frames_compose_with_tiles(parts):
    description = {**parts, "projector_type": "pixel_shuffle", "tiling": {"max_tiles": 4}}
    tiled = load_pretrained_model(description, dtype="float32")
    message = {
        "role": "user",
        "content": [{"type": "image", "image": CINE, "frames": 2}, QUESTION_ITEM],
    }
    pictures = read_message(tiled.processor, message).pictures
    for picture, frame in zip(pictures, (7, 22), strict=True):
        alone = tiled.processor.pixel_values([to_pil(CINE, frame=frame)])
        assert len(alone) > 1
        assert torch.equal(picture.inputs["pixel_values"], alone)
    expected = Conversation(tiled).ask(QUESTION, {"image": CINE, "frames": 2}, max_new_tokens=4)
    assert tiled.answer(CINE, QUESTION, frames=2, max_new_tokens=4) == [expected]


def test_an_explanation_has_a_picture_for_each_slice(loaded):
    explained = explain(loaded, VOLUME, QUESTION, view=OPTIONS, blank=False, max_new_tokens=3)
    assert explained.question == QUESTION
    assert len(explained.pictures) == 3
    assert explained.answer == loaded.answer(VOLUME, QUESTION, **OPTIONS, max_new_tokens=3)[0]


def test_parts_are_not_opened_to_expand_messages(monkeypatch):
    monkeypatch.setattr("moellava.images.reading.to_pil", None)
    message = {"role": "user", "content": [{"type": "image", "image": VOLUME}, QUESTION_ITEM]}
    (found,) = expand_images([message], slices=2)
    kinds = [item["type"] for item in found["content"]]
    assert kinds == ["text", "image", "text", "image", "text"]
    assert expand_images([{"role": "assistant", "content": "A CT."}]) == [
        {"role": "assistant", "content": "A CT."}
    ]


def test_an_error_leaves_the_conversation_as_it_was(loaded):
    conversation = Conversation(loaded)
    with pytest.raises(ValueError, match="the volume has 25 in the range, and num is 99"):
        conversation.ask(QUESTION, {"image": VOLUME, "slices": 99})
    assert conversation.turns == ()
    with pytest.raises(ValueError, match=r"Unknown key of an item of type 'image' 'slcies'"):
        conversation.ask(QUESTION, {"image": VOLUME, "slcies": 3})
