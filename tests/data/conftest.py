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
