import logging
import threading

import pytest
import torch
from transformers import DynamicCache

from moellava.model.builder_enhanced import load_pretrained_model
from moellava.model.conversation import Conversation, answer_batch, start_answer
from moellava.model.turns import read_message
from moellava.testing import SMOLLM2

QUESTIONS = ("What modality is this?", "Which organ is shown?", "Is there a fracture?")
NEW = {"max_new_tokens": 6}


@pytest.fixture
def encoded(loaded, monkeypatch):
    """How many images the tower has seen, call by call."""
    counts = []
    encode = loaded.model.model.get_image_features
    monkeypatch.setattr(
        loaded.model.model,
        "get_image_features",
        lambda pixel_values, *args, **kwargs: (
            counts.append(len(pixel_values)) or encode(pixel_values, *args, **kwargs)
        ),
    )
    return counts


@pytest.fixture
def forwarded(loaded, monkeypatch):
    """The logits and lengths of all calls of the model."""
    calls = []
    forward = loaded.model.forward

    def recorded(*args, **kwargs):
        output = forward(*args, **kwargs)
        calls.append((kwargs["input_ids"].shape[1], output.logits[0, -1]))
        return output

    monkeypatch.setattr(loaded.model, "forward", recorded)
    return calls


def user(text, *images):
    items = [{"type": "image", "image": image} for image in images]
    return {"role": "user", "content": [*items, {"type": "text", "text": text}]}


def test_one_turn_is_what_answer_says(loaded, images):
    (answer,) = loaded.answer(images[:2], QUESTIONS[0], **NEW)
    assert loaded.chat([user(QUESTIONS[0], *images[:2])], **NEW) == answer
    assert Conversation(loaded).ask(QUESTIONS[0], images[:2], **NEW) == answer


def test_pieces_joined_are_the_whole_answer_and_generates_own(loaded, images):
    messages = [user(QUESTIONS[0], images[0])]
    pieces = list(loaded.chat(messages, stream=True, max_new_tokens=40))
    assert len(pieces) > 5
    assert "".join(pieces) == loaded.chat(messages, max_new_tokens=40)
    prompt = loaded.processor.apply_chat_template(
        messages, add_generation_prompt=True, tokenize=False
    )
    inputs = loaded.processor(text=[prompt], images=[images[0]], return_tensors="pt")
    ids = loaded.model.generate(**inputs, max_new_tokens=40, do_sample=False, max_length=None)
    new = ids[0, inputs["input_ids"].shape[1] :]
    assert loaded.tokenizer.decode(new, skip_special_tokens=True).strip() == "".join(pieces)


def test_the_first_piece_comes_before_the_answer_is_complete(loaded, images, forwarded):
    stream = loaded.stream([user(QUESTIONS[0], images[0])], max_new_tokens=200)
    next(stream)
    stream.close()
    assert len(forwarded) < 150


def test_a_continued_cache_equals_a_fresh_run(loaded, images, forwarded):
    kept = Conversation(loaded, system="Answer briefly.")
    turns = [(QUESTIONS[0], [images[0]]), (QUESTIONS[1], []), (QUESTIONS[2], images[1:])]
    for question, own in turns:
        fresh = kept.copy()
        answer = kept.ask(question, own, **NEW)
        continued = [logits for _, logits in forwarded]
        forwarded.clear()
        assert fresh.ask(question, own, **NEW) == answer
        for one, other in zip(continued, [logits for _, logits in forwarded], strict=True):
            torch.testing.assert_close(one, other, rtol=0, atol=1e-4)
        forwarded.clear()


def test_images_are_encoded_once(loaded, images, encoded):
    conversation = Conversation(loaded)
    conversation.ask(QUESTIONS[0], images[0], **NEW)
    conversation.ask(QUESTIONS[1], **NEW)
    conversation.ask(QUESTIONS[2], images[1:], **NEW)
    conversation.ask(QUESTIONS[0], **NEW)
    assert encoded == [1, 2]


def test_a_later_turn_runs_its_own_tokens_only(loaded, images, forwarded):
    conversation = Conversation(loaded)
    conversation.ask(QUESTIONS[0], images[0], **NEW)
    before = conversation.num_tokens
    forwarded.clear()
    conversation.ask(QUESTIONS[1], **NEW)
    assert forwarded[0][0] < 196 < before  # the question, and the answer if it is spelt otherwise


def test_another_image_in_the_same_place_is_not_taken_from_the_cache(loaded, images):
    conversation = Conversation(loaded)
    conversation.ask(QUESTIONS[0], images[0], max_new_tokens=20)
    conversation.undo()
    assert conversation.turns == ()
    other = conversation.ask(QUESTIONS[0], images[1], max_new_tokens=20)
    assert other == loaded.answer(images[1], QUESTIONS[0], max_new_tokens=20)[0]


def test_the_same_question_again_has_the_same_answer(loaded, images):
    conversation = Conversation(loaded)
    first = conversation.ask(QUESTIONS[0], images[0], **NEW)
    conversation.undo()
    assert conversation.ask(QUESTIONS[0], images[0], **NEW) == first


def test_the_system_prompt_is_the_first_turn_and_survives_a_reset(loaded):
    conversation = Conversation(loaded, system="Answer yes or no.")
    answer = conversation.ask(QUESTIONS[2], **NEW)
    messages = [{"role": "system", "content": "Answer yes or no."}, user(QUESTIONS[2])]
    assert answer == loaded.chat(messages, **NEW) != loaded.chat(messages[1:], **NEW)
    conversation.reset()
    assert [turn.role for turn in conversation.turns] == ["system"]
    assert conversation.ask(QUESTIONS[2], **NEW) == answer


def test_a_message_is_a_string_or_items_in_their_order(loaded, images):
    history = [user(QUESTIONS[0], images[0]), {"role": "assistant", "content": "A CT."}]
    asked = {"role": "user", "content": [{"type": "text", "text": "Why?"}]}
    assert loaded.chat([*history, asked], **NEW) == loaded.chat(
        [*history, {"role": "user", "content": "Why?"}], **NEW
    )


def test_an_image_is_seen_through_its_window(loaded):
    from pydicom.data import get_testdata_file

    from moellava.images import to_pil

    path = get_testdata_file("CT_small.dcm", download=False)
    item = {"type": "image", "image": path, "window": "lung"}
    seen = read_message(loaded.processor, {"role": "user", "content": [item]}).pictures[0]
    picture = to_pil(path, window="lung")
    expected = loaded.processor.image_processor(picture, return_tensors="pt")["pixel_values"]
    assert torch.equal(seen.inputs["pixel_values"], expected)
    assert (seen.name, seen.view) == ("CT_small.dcm", {"window": "lung"})


def test_bytes_are_an_image(loaded, images, tmp_path):
    images[0].save(tmp_path / "scan.png")
    data = (tmp_path / "scan.png").read_bytes()
    assert (
        Conversation(loaded).ask("Why?", data, **NEW) == loaded.answer(images[0], "Why?", **NEW)[0]
    )


class TestEnds:
    def test_a_stop_string_is_cut_off_and_never_streamed(self, loaded):
        messages = [user("Hello?")]
        whole = loaded.chat(messages, max_new_tokens=30)
        stop = whole[len(whole) // 2 :][:4]
        expected = whole[: whole.index(stop)].strip()
        pieces = list(loaded.stream(messages, max_new_tokens=30, stop_strings=[stop]))
        assert "".join(pieces) == expected
        assert loaded.chat(messages, max_new_tokens=30, stop_strings=stop) == expected

    def test_closing_a_stream_keeps_what_came(self, loaded, images):
        conversation = Conversation(loaded)
        stream = conversation.stream(QUESTIONS[0], images[0], max_new_tokens=200)
        piece = next(stream)
        stream.close()
        assert conversation.turns[-1].role == "assistant"
        assert conversation.turns[-1].text.startswith(piece)
        fresh = conversation.copy()
        assert fresh.ask(QUESTIONS[1], **NEW) == conversation.ask(QUESTIONS[1], **NEW)
        assert not [t for t in threading.enumerate() if t.name == "moellava-generate"]

    def test_an_error_while_generating_takes_the_question_back(self, loaded, monkeypatch):
        conversation = Conversation(loaded)
        conversation.ask("Hello?", **NEW)
        turns = conversation.turns
        with monkeypatch.context() as patch:
            patch.setattr(loaded.model, "forward", lambda **_: 1 / 0)
            with pytest.raises(ZeroDivisionError):
                conversation.ask("Why?", **NEW)
        assert conversation.turns == turns
        assert conversation.ask("Why?", **NEW)


class TestGenerationOptions:
    def test_beams(self, loaded, images):
        conversation = Conversation(loaded)
        conversation.ask("Hello?", images[0], **NEW)
        fresh = conversation.copy()
        answer = conversation.ask("Why?", num_beams=2, **NEW)
        assert fresh.ask("Why?", num_beams=2, **NEW) == answer

    def test_samples_repeat_with_a_seed(self, loaded):
        answers = []
        for _ in range(2):
            torch.manual_seed(5)
            answers.append(loaded.chat([user("Hello?")], do_sample=True, max_new_tokens=10))
        assert answers[0] == answers[1] != loaded.chat([user("Hello?")], max_new_tokens=10)

    def test_without_a_cache(self, loaded):
        conversation = Conversation(loaded)
        conversation.ask("Hello?", use_cache=False, **NEW)
        kept = Conversation(loaded)
        kept.ask("Hello?", **NEW)
        assert conversation.turns == kept.turns
        assert conversation.ask("Why?", use_cache=False, **NEW) == kept.ask("Why?", **NEW)

    def test_an_unknown_option_is_refused(self, loaded):
        with pytest.raises(
            TypeError, match=r"no option 'max_new_token'\. Did you mean 'max_new_tok"
        ):
            loaded.chat([user("Hello?")], max_new_token=3)


class TestErrors:
    def test_overflow_is_counted_and_changes_nothing(self, loaded, images):
        conversation = Conversation(loaded)
        conversation.ask("Hello?", **NEW)
        turns = conversation.turns
        many = images * 4
        message = (
            r"The conversation has 2\d{3} tokens \(2352 of images, \d+ of text\) and max_new_tokens"
            r" is 64, but the context holds 2048: \d+ tokens would be cut"
        )
        with pytest.raises(ValueError, match=message):
            conversation.ask("Which differ?", many)
        assert conversation.turns == turns

    def test_overflow_has_no_warning_beside_its_error(self, loaded, images, caplog, monkeypatch):
        monkeypatch.setattr(loaded.tokenizer, "deprecation_warnings", {})  # it warns once
        monkeypatch.setattr(logging.getLogger("transformers"), "propagate", True)
        with pytest.raises(ValueError, match="would be cut"):
            Conversation(loaded).ask("Which differ?", images * 4)
        assert not caplog.records

    @pytest.mark.parametrize(
        ("message", "error"),
        [
            ({"role": "usr", "content": "Hi"}, "Unknown role 'usr'. Did you mean 'user'"),
            ({"role": "user", "text": "Hi"}, "Unknown key of a message 'text'"),
            ({"role": "user", "content": 7}, "content of a message is 7; expected text or a list"),
            ({"role": "user", "content": ""}, "The question is empty"),
            ({"role": "user", "content": [{"type": "image"}]}, 'has no "image"'),
            ({"role": "user", "content": [{"type": "video"}]}, "expected .*type.*image"),
            (
                {"role": "user", "content": [{"type": "image", "image": 1, "windw": 2}]},
                "Unknown key of an item of type 'image' 'windw'. Did you mean 'window'",
            ),
            (
                {"role": "user", "content": [{"type": "image", "image": b"none"}]},
                "cannot be read as an image",
            ),
            (
                {"role": "system", "content": [{"type": "image", "image": "x.png"}]},
                "does not exist",
            ),
        ],
    )
    def test_a_message_that_cannot_be_read(self, loaded, message, error):
        with pytest.raises((ValueError, FileNotFoundError), match=error):
            loaded.chat([message])

    def test_a_dataset_in_the_wrong_place_is_not_quoted(self, loaded):
        import pydicom

        dataset = pydicom.Dataset()
        dataset.PatientName = "MARKED"
        for message in (
            {"role": "user", "content": dataset},
            {"role": "user", "content": [dataset]},
            {"role": "user", "content": [{"type": "text", "text": dataset}]},
            {"role": dataset, "content": "Hi"},
        ):
            with pytest.raises((ValueError, TypeError)) as error:
                loaded.chat([message])
            assert "MARKED" not in str(error.value)
        for arguments in ((dataset, dataset), ("x.png", dataset), (None, [dataset])):
            with pytest.raises((ValueError, TypeError)) as error:
                loaded.answer(*arguments)
            assert "MARKED" not in str(error.value)

    def test_only_the_user_shows_images(self, loaded, images):
        item = {"type": "image", "image": images[0]}
        with pytest.raises(ValueError, match="role 'system' holds an image"):
            loaded.chat([{"role": "system", "content": [item]}, user("Hi")])

    def test_the_last_message_must_be_the_users(self, loaded):
        with pytest.raises(ValueError, match="The last message is not the user's"):
            loaded.chat([user("Hi"), {"role": "assistant", "content": "Hello."}])

    def test_an_image_token_in_the_text(self, loaded, images):
        with pytest.raises(ValueError, match=r"2 times <image> for 1 images\. Leave <image> out"):
            Conversation(loaded).ask("What is <image>?", images[0])

    def test_a_conversation_gives_one_answer_at_a_time(self, loaded):
        conversation = Conversation(loaded)
        stream = conversation.stream("Hello?", max_new_tokens=100)
        next(stream)
        with pytest.raises(ValueError, match="is being answered"):
            conversation.ask("Why?")
        with pytest.raises(ValueError, match="is being answered"):
            conversation.reset()
        stream.close()
        early = conversation.stream("One?")
        conversation.ask("Two?", **NEW)
        with pytest.raises(ValueError, match="has changed since"):
            next(early)

    def test_a_checkpoint_without_chat_template(self, loaded, monkeypatch):
        monkeypatch.setattr(loaded.processor, "chat_template", None)
        with pytest.raises(ValueError, match="chat template"):
            Conversation(loaded).ask("Hello?")


def test_a_batch_equals_one_by_one(loaded, images):
    asked = [[user(QUESTIONS[0], images[0])], [user("Why?")], [user("Which?", *images[1:])]]
    conversations = [
        [read_message(loaded.processor, message) for message in messages] for messages in asked
    ]
    lengths = (9, 4, 12)
    started = [
        start_answer(loaded, turns, max_new_tokens=length)
        for turns, length in zip(conversations, lengths, strict=True)
    ]
    answers = [answer for answer, _ in started]
    answer_batch(loaded, conversations, answers)
    alone = [
        loaded.chat(messages, max_new_tokens=length)
        for messages, length in zip(asked, lengths, strict=True)
    ]
    assert [answer.text for answer in answers] == alone
    assert started[1][1] == len(
        loaded.processor.apply_chat_template(
            [asked[1]], add_generation_prompt=True, tokenize=True, return_dict=True
        )["input_ids"][0]
    )


def test_another_language_model(hub_cache, small_biomedclip, images):
    """SmolLM2: byte-level tokens, another template, a system turn that the template adds."""
    parts = {"model_name_or_path": SMOLLM2, "mm_vision_tower": str(small_biomedclip)}
    loaded = load_pretrained_model(parts, dtype="float32")
    conversation = Conversation(loaded)
    first = conversation.ask(QUESTIONS[0], images[0], max_new_tokens=30)
    assert first == loaded.answer(images[0], QUESTIONS[0], max_new_tokens=30)[0]
    fresh = conversation.copy()
    pieces = list(conversation.stream(QUESTIONS[1], images[1], max_new_tokens=30))
    assert fresh.ask(QUESTIONS[1], images[1], max_new_tokens=30) == "".join(pieces)


def test_a_cache_with_a_sliding_window_is_not_cut(loaded, monkeypatch):
    conversation = Conversation(loaded)
    conversation.ask(QUESTIONS[0], **NEW)
    monkeypatch.setattr(DynamicCache, "is_sliding", property(lambda self: [True]))
    monkeypatch.setattr(DynamicCache, "crop", lambda *_: pytest.fail("cut"))
    conversation.undo()
    assert conversation.ask(QUESTIONS[1], **NEW) == loaded.answer(None, QUESTIONS[1], **NEW)[0]
