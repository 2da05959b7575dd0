"""Rows → one training batch: padding, packing, lengths, errors that name the row."""

import pytest
import torch

from moellava.data.collate import ChatCollator
from moellava.model.builder_enhanced import load_pretrained_model
from moellava.testing import TINYLLAMA

from .conftest import conversation, row


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
