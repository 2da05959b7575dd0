"""Which tokens are the assistant's, against masks written by hand and transformers' own."""

import pytest
import torch

from moellava.data.collate import ChatCollator

from .conftest import conversation, row


def test_labels_equal_a_mask_written_by_hand(collator):
    tokenizer = collator.processor.tokenizer
    batch = collator([row("Why?", "no")])
    text = "<s><|user|>\nWhy?</s>\n<|assistant|>\n"  # the template begins the text
    prompt = tokenizer(text, add_special_tokens=False).input_ids
    expected = tokenizer(f"{text}no</s>\n", add_special_tokens=False).input_ids
    ids, labels = batch["input_ids"][0].tolist(), batch["labels"][0].tolist()
    assert ids == expected
    num_prompt = len(prompt)
    assert labels == [-100] * num_prompt + expected[num_prompt:-1] + [
        -100
    ]  # the last newline is the template's


# Label masks written by hand: «» stands around what is to be learned.
SYSTEM = (
    "A chat between a curious user and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user's questions."
)


BY_HAND = {
    "tinyllama": (
        "<|user|>\n@What is it?</s>\n<|assistant|>\n«A CT.</s>»\n"
        "<|user|>\nSure?</s>\n<|assistant|>\n«yes</s>»\n"
    ),
    "vicuna_v1": (
        f"{SYSTEM} USER: @What is it? ASSISTANT: «A CT.</s>»USER: Sure? ASSISTANT: «yes</s>»"
    ),
    "plain": "@«A CT.\n»«yes\n»",
}


# ChatML as models carry it: no marks, and a system turn of its own.
CHATML_BY_HAND = (
    "<|im_start|>system\nBe helpful.<|im_end|>\n"
    "<|im_start|>user\n<image>\nWhat is it?<|im_end|>\n<|im_start|>assistant\n«A CT.<|im_end|>»\n"
    "<|im_start|>user\nSure?<|im_end|>\n<|im_start|>assistant\n«yes<|im_end|>»\n"
)


CHATML = (
    "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}"
    "{{ '<|im_start|>system\nBe helpful.<|im_end|>\n' }}{% endif %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def ids_and_labels_by_hand(text, processor):
    """The token ids of a marked text, and as labels those that end between « and »."""
    is_learned, plain, learning = [], "", False
    for letter in text:
        if letter in "«»":
            learning = letter == "«"
        else:
            plain += letter
            is_learned.append(learning)
    has_begun = plain.startswith(processor.tokenizer.bos_token)
    encoded = processor.tokenizer(
        plain, return_offsets_mapping=True, add_special_tokens=not has_begun
    )
    ids, labels = [], []
    for token, (_, end) in zip(encoded["input_ids"], encoded["offset_mapping"], strict=True):
        many = processor.num_image_tokens if token == processor.image_token_id else 1
        ids += [token] * many
        labels += [token if end and is_learned[end - 1] else -100] * many
    return ids, labels


@pytest.mark.parametrize("template", BY_HAND)
def test_labels_of_each_template_equal_a_mask_written_by_hand(template, collator, grey):
    processor = collator.processor
    batch = ChatCollator(processor, chat_template=template)([{"messages": conversation(grey)}])
    image = "<image>" if template == "plain" else "<image>\n"
    ids, labels = ids_and_labels_by_hand(BY_HAND[template].replace("@", image), processor)
    assert batch["input_ids"][0].tolist() == ids
    assert batch["labels"][0].tolist() == labels


@pytest.mark.parametrize("marked", [True, False])
def test_chatml_is_read_by_our_marks_and_without_marks_turn_by_turn(
    collator, grey, monkeypatch, marked
):
    from moellava.model.chat_templates import flatten_messages, multimodal_chat_template

    processor = collator.processor
    monkeypatch.setattr(processor.tokenizer, "chat_template", CHATML)
    template = (
        multimodal_chat_template(processor.tokenizer)
        if marked
        else flatten_messages("text") + CHATML
    )
    assert ("generation -%}" in template) == marked
    batch = ChatCollator(processor, chat_template=template)([{"messages": conversation(grey)}])
    # A template that was made for the tokenizer begins the text; with others the processor does.
    beginning = processor.tokenizer.bos_token if marked else ""
    ids, labels = ids_and_labels_by_hand(beginning + CHATML_BY_HAND, processor)
    assert batch["input_ids"][0].tolist() == ids
    assert batch["labels"][0].tolist() == labels


def test_a_template_that_rewrites_earlier_turns_is_refused(collator):
    last_only = "{% for m in messages[-1:] %}{{ m['role'] + m['content'] }}{% endfor %}"
    chat = [{"role": role, "content": "a"} for role in ("user", "assistant", "user", "assistant")]
    with pytest.raises(ValueError, match=r"Row 0: the chat template has no {% generation %} marks"):
        ChatCollator(collator.processor, chat_template=last_only)([{"messages": chat}])


def test_tokens_and_labels_equal_transformers_own(collator, grey):
    rows = [{"messages": conversation(grey)}, row("Why?", "no")]
    batch = collator(rows)
    theirs = collator.processor.apply_chat_template(
        [r["messages"] for r in rows],
        tokenize=True,
        return_dict=True,
        return_assistant_tokens_mask=True,
        return_tensors="pt",
        processor_kwargs={"padding": True, "padding_side": "right"},
    )
    assert torch.equal(batch["input_ids"], theirs["input_ids"])
    assert torch.equal(batch["attention_mask"], theirs["attention_mask"])
    assert torch.equal(batch["pixel_values"], theirs["pixel_values"])
    assert torch.equal(batch["labels"] != -100, torch.as_tensor(theirs["assistant_masks"]).bool())


def test_a_placeholder_written_into_the_text_is_an_error(collator, grey):
    with pytest.raises(
        ValueError, match=r"Row 'x': the text holds 2 <image>, but the messages hold 1 images"
    ):
        collator([row("Is <image> this?", "no", grey, id="x")])


def test_lengths_are_those_of_the_collated_rows(collator, grey):
    from moellava.data.chat_labels import num_chat_tokens

    chats = [conversation(grey), row("Why?", "no")["messages"]]
    lengths = num_chat_tokens(chats, collator.processor, collator.chat_template)
    assert lengths == [collator([{"messages": chat}])["input_ids"].shape[1] for chat in chats]
