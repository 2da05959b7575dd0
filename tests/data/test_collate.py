import pytest
import torch

from moellava.data.collate import ChatCollator
from moellava.model.builder_enhanced import load_pretrained_model
from moellava.testing import TINYLLAMA


@pytest.fixture(scope="module")
def collator(hub_cache, small_biomedclip):
    parts = {"model_name_or_path": TINYLLAMA, "mm_vision_tower": str(small_biomedclip)}
    return ChatCollator(load_pretrained_model(parts).processor)


def row(question, answer, image=None, **more):
    picture = [] if image is None else [{"type": "image", "image": image}]
    user = {"role": "user", "content": [*picture, {"type": "text", "text": question}]}
    return {"messages": [user, {"role": "assistant", "content": answer}], **more}


@pytest.fixture
def grey():
    from PIL import Image

    return Image.new("RGB", (40, 30), (90, 90, 90))


def test_labels_are_the_assistants_tokens_and_nothing_else(collator, grey):
    tokenizer = collator.processor.tokenizer
    batch = collator([row("Is this a CT image?", "yes", grey), row("What is this?", "Stained tissue, I think.", grey)])
    for labels, answer in zip(batch["labels"], ("yes", "Stained tissue, I think."), strict=True):
        assert tokenizer.decode(labels[labels != -100]) == f"{answer}</s>"
    ids, labels = batch["input_ids"], batch["labels"]
    assert torch.equal(ids[labels != -100], labels[labels != -100])


def test_labels_equal_a_mask_written_by_hand(collator):
    tokenizer = collator.processor.tokenizer
    batch = collator([row("Why?", "no")])
    text = "<|user|>\nWhy?</s>\n<|assistant|>\n"
    prompt = tokenizer(text).input_ids
    expected = tokenizer(f"{text}no</s>\n").input_ids
    ids, labels = batch["input_ids"][0].tolist(), batch["labels"][0].tolist()
    assert ids == expected
    num_prompt = len(prompt)
    assert labels == [-100] * num_prompt + expected[num_prompt:-1] + [-100]  # the last newline is the template's


def test_padding_is_on_the_right_and_not_supervised(collator, grey):
    batch = collator([row("Is this?", "no", grey), row("Is this a CT image of the lungs, or not?", "no", grey)])
    short = batch["attention_mask"][0]
    assert short.diff().max() <= 0
    assert (batch["labels"][0][short == 0] == -100).all()
    assert batch["pixel_values"].shape[0] == 2


def test_every_turn_of_the_assistant_is_supervised(collator, grey):
    chat = row("Is this?", "no", grey)["messages"] + row("Why?", "yes")["messages"]
    labels = collator([{"messages": chat}])["labels"][0]
    assert collator.processor.tokenizer.decode(labels[labels != -100]) == "no</s>yes</s>"


def test_a_row_without_answer_is_named(collator):
    question = {"messages": [{"role": "user", "content": "Why?"}], "id": "case-7"}
    with pytest.raises(ValueError, match="Row 'case-7' has no assistant turn"):
        collator([row("Why?", "no"), question])
