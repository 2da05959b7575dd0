"""Prompts that are shortened keep every image token."""

import pytest
import torch

LONG = "Is this a CT image? <image> Which organ is shown? <image> Why, and is there a fracture?"


class TestTruncation:
    @pytest.mark.parametrize("side", ["right", "left"])
    def test_text_is_shortened_and_every_image_token_stays(self, loaded, images, monkeypatch, side):
        monkeypatch.setattr(loaded.tokenizer, "truncation_side", side)
        options = {"text": LONG, "images": images[:2]}
        whole = loaded.processor(**options)["input_ids"][0]
        ids = loaded.processor(**options, truncation=True, max_length=len(whole) - 9)["input_ids"][
            0
        ]
        assert len(ids) == len(whole) - 9
        assert ids.count(32000) == 2 * 196
        text = [token for token in whole if token != 32000]
        kept = text[:-9] if side == "right" else [text[0], *text[10:]]  # <s> stays
        assert [token for token in ids if token != 32000] == kept

    def test_text_between_images_goes_when_text_behind_them_is_not_enough(self, loaded, images):
        ids = loaded.processor(text=LONG, images=images[:2], truncation=True, max_length=393)[
            "input_ids"
        ][0]
        assert ids == [loaded.tokenizer.bos_token_id] + [32000] * 392

    def test_without_images_it_is_the_tokenizers_own(self, loaded):
        options = {
            "truncation": True,
            "max_length": 7,
            "padding": "max_length",
            "return_tensors": "pt",
        }
        texts = ["Is there a fracture in this image?", "Why?"]
        ours, theirs = loaded.processor(text=texts, **options), loaded.tokenizer(texts, **options)
        assert all(torch.equal(ours[key], theirs[key]) for key in theirs)

    @pytest.mark.parametrize("side", ["right", "left"])
    @pytest.mark.parametrize("padding", [True, "max_length"])
    def test_a_batch_is_padded_as_the_tokenizer_pads(self, loaded, images, padding, side):
        texts, options = (
            ["<image> Why?", "What?"],
            {"padding": padding, "padding_side": side, "return_tensors": "pt"},
        )
        # 512 tokens cut nothing, so that the two must agree
        ours = loaded.processor(
            text=texts,
            images=images[0],
            truncation=True,
            max_length=512,
            return_mm_token_type_ids=True,
            **options,
        )
        options |= {"max_length": 512} if padding == "max_length" else {}
        theirs = loaded.processor(
            text=texts, images=images[0], return_mm_token_type_ids=True, **options
        )
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(ours[key], theirs[key]) for key in theirs)

    def test_rows_come_in_multiples_and_nested_settings_count(self, loaded, images):
        inputs = loaded.processor(
            text=LONG, images=images[:2], return_tensors="pt",
            text_kwargs={"truncation": True, "max_length": 400, "padding": True,
            "pad_to_multiple_of": 64},
        )  # fmt: skip
        assert inputs["input_ids"].shape == (1, 448)
        assert inputs["attention_mask"].sum() == 400

    def test_the_tokenizers_length_holds_where_none_is_given(self, loaded, images):
        ids = loaded.processor(text="<image>" + " Why?" * 1500, images=images[0], truncation=True)[
            "input_ids"
        ][0]
        assert len(ids) == loaded.tokenizer.model_max_length == 2048

    def test_assistant_masks_survive_it(self, loaded, images):
        chat = [
            {
                "role": "user",
                "content": [
                    {"type": "image", "image": images[0]},
                    {"type": "text", "text": "Why?"},
                ],
            },
            {"role": "assistant", "content": "yes " * 30},
        ]
        options = {"tokenize": True, "return_dict": True, "return_assistant_tokens_mask": True}
        whole = loaded.processor.apply_chat_template(chat, **options)
        cut = loaded.processor.apply_chat_template(
            chat,
            **options,
            return_tensors="pt",
            processor_kwargs={"truncation": True, "max_length": 230, "padding": True},
        )
        assert cut["input_ids"][0].tolist() == whole["input_ids"][0][:230]
        assert (
            torch.as_tensor(cut["assistant_masks"])[0].tolist() == whole["assistant_masks"][0][:230]
        )
        assert sum(whole["assistant_masks"][0][:230]) > 0

    def test_images_that_alone_exceed_the_length_are_an_error_with_both_numbers(
        self, loaded, images
    ):
        with pytest.raises(ValueError, match=r"Prompt 2 has 392 image tokens.*max_length is 392"):
            loaded.processor(
                text=["Why?", LONG], images=images[:2], truncation=True, max_length=392
            )
