"""Conversations, and a collator for the small stand-ins."""

import pytest

from moellava.data.collate import ChatCollator
from moellava.model.builder_enhanced import load_pretrained_model
from moellava.testing import TINYLLAMA


def row(question, answer, image=None, **more):
    picture = [] if image is None else [{"type": "image", "image": image}]
    user = {"role": "user", "content": [*picture, {"type": "text", "text": question}]}
    return {"messages": [user, {"role": "assistant", "content": answer}], **more}


def conversation(image):
    return [*row("What is it?", "A CT.", image)["messages"], *row("Sure?", "yes")["messages"]]


@pytest.fixture(scope="module")
def collator(hub_cache, small_biomedclip):
    parts = {"model_name_or_path": TINYLLAMA, "mm_vision_tower": str(small_biomedclip)}
    return ChatCollator(load_pretrained_model(parts).processor)


@pytest.fixture
def grey():
    from PIL import Image

    return Image.new("RGB", (40, 30), (90, 90, 90))


# A change of a LLaVA row, and what its error says.
BROKEN = (
    ({"conversations": None}, "'conversations' is missing"),
    ({"conversations": [{"from": "human"}]}, r"turn 0 has no 'value'; it has \['from'\]"),
    (
        {"conversations": [{"from": "alien", "value": "x"}]},
        "turn 0 is from 'alien'; expected one of human",
    ),
    (
        {"conversations": [{"from": "human", "value": 3}]},
        "'value' of turn 0 is a int; expected text",
    ),
    ({"conversations": ["Why?"]}, "turn 0 is a str"),
    ({"image": ["a.jpg", "b.jpg"]}, "1 <image> marks for 2 images"),
    ({"image": None}, "1 <image> marks for 0 images"),
    ({"image": 3}, "an image is a int"),
    ({"image": {"bytes": 3, "path": ["a"]}}, "an image is a list; expected a path"),
    ({"extra_json": "{"}, "'extra_json' is not JSON"),
    ({"extra_json": "[]"}, "'extra_json' holds a list; expected an object"),
    ({"video": "a.mp4"}, "it has a 'video'"),
)
