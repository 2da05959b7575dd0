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
    batch = collator(
        [
            row("Is this a CT image?", "yes", grey),
            row("What is this?", "Stained tissue, I think.", grey),
        ]
    )
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
    assert labels == [-100] * num_prompt + expected[num_prompt:-1] + [
        -100
    ]  # the last newline is the template's


def test_padding_is_on_the_right_and_not_supervised(collator, grey):
    batch = collator(
        [row("Is this?", "no", grey), row("Is this a CT image of the lungs, or not?", "no", grey)]
    )
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


# Label masks written by hand: «» stands around what is to be learned.
SYSTEM = (
    "A chat between a curious user and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user's questions."
)
BY_HAND = {
    "tinyllama": (
        "<|user|>\n@What is it?</s>\n<|assistant|>\n«A CT.</s>»\n<|user|>\nSure?</s>\n<|assistant|>\n«yes</s>»\n"
    ),
    "vicuna_v1": f"{SYSTEM} USER: @What is it? ASSISTANT: «A CT.</s>»USER: Sure? ASSISTANT: «yes</s>»",
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
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def conversation(image):
    return [*row("What is it?", "A CT.", image)["messages"], *row("Sure?", "yes")["messages"]]


def ids_and_labels_by_hand(text, processor):
    """The token ids of a marked text, and as labels those whose last character stands between « and »."""
    is_learned, plain, learning = [], "", False
    for letter in text:
        if letter in "«»":
            learning = letter == "«"
        else:
            plain += letter
            is_learned.append(learning)
    encoded = processor.tokenizer(plain, return_offsets_mapping=True)
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
    from moellava.model.chat_templates import _FLATTEN, multimodal_chat_template

    processor = collator.processor
    monkeypatch.setattr(processor.tokenizer, "chat_template", CHATML)
    template = (
        multimodal_chat_template(processor.tokenizer)
        if marked
        else _FLATTEN.replace("TEXT", "text") + CHATML
    )
    assert ("generation -%}" in template) == marked
    batch = ChatCollator(processor, chat_template=template)([{"messages": conversation(grey)}])
    ids, labels = ids_and_labels_by_hand(CHATML_BY_HAND, processor)
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


def test_an_unreadable_image_is_named_with_its_row(collator, tmp_path):
    (tmp_path / "a.png").write_bytes(b"no image")
    with pytest.raises(ValueError, match=r"Row 'x': .*a\.png"):
        collator([row("Is this?", "no", tmp_path / "a.png", id="x")])


def test_long_rows_are_refused_or_cut_but_never_in_an_image(collator, grey):
    processor = collator.processor
    long = row("Why?", "no " * 50, id="long")
    with pytest.raises(ValueError, match=r"Row 'long' has \d+ tokens, but max_length is 40"):
        ChatCollator(processor, max_length=40)([long])
    cut = ChatCollator(processor, max_length=40, long_rows="truncate")([long])
    assert cut["input_ids"].shape == (1, 40)
    assert torch.equal(cut["input_ids"][0], collator([long])["input_ids"][0, :40])
    with pytest.raises(ValueError, match="would cut off an image"):
        ChatCollator(processor, max_length=40, long_rows="truncate")([row("Why?", "no", grey)])
    with pytest.raises(ValueError, match="would cut off the whole answer"):
        ChatCollator(processor, max_length=5, long_rows="truncate")([long])


def test_lengths_are_those_of_the_collated_rows(collator, grey):
    from moellava.data.chat_labels import num_chat_tokens

    chats = [conversation(grey), row("Why?", "no")["messages"]]
    lengths = num_chat_tokens(chats, collator.processor, collator.chat_template)
    assert lengths == [collator([{"messages": chat}])["input_ids"].shape[1] for chat in chats]


def test_packed_rows_give_the_loss_and_gradients_of_separate_ones(
    hub_cache, small_biomedclip, grey
):
    """Each row alone, weighted by its labels, against all of them in one sequence."""
    parts = {"model_name_or_path": TINYLLAMA, "mm_vision_tower": str(small_biomedclip)}
    model, processor = (
        (loaded := load_pretrained_model(parts, dtype="float32"))[0],
        loaded.processor,
    )
    model.train()
    model.config.text_config.router_aux_loss_coef = 0.0  # over a batch's tokens, not a row's
    rows = [
        {"messages": conversation(grey)},
        row("Why?", "no"),
        row("Is this a CT image of it?", "yes", grey),
    ]
    alone = [ChatCollator(processor)([one]) for one in rows]
    counts = [(batch["labels"][:, 1:] != -100).sum() for batch in alone]
    expected = sum(
        model(**batch).loss * count for batch, count in zip(alone, counts, strict=True)
    ) / sum(counts)
    expected.backward()
    gradient = model.model.multi_modal_projector[0].weight.grad.clone()
    model.zero_grad()
    packed = ChatCollator(processor, packing=True)(rows)
    assert packed["input_ids"].shape == (1, sum(batch["input_ids"].shape[1] for batch in alone))
    loss = model(**packed).loss
    loss.backward()
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(
        model.model.multi_modal_projector[0].weight.grad, gradient, rtol=1e-4, atol=1e-7
    )
    # The oracle can say no: without the new beginnings, rows look at each other.
    unseparated = {**packed, "position_ids": torch.arange(packed["input_ids"].shape[1])[None]}
    assert not torch.allclose(model(**unseparated).loss, expected, rtol=1e-4)
