import pytest
import torch

from moellava.model.processing_moellava import MoeLlavaProcessor
from moellava.testing import TINYLLAMA


def test_one_image_becomes_196_placeholders(loaded, images):
    inputs = loaded.processor(text="<image>\nWhat is this?", images=images[0], return_tensors="pt")
    assert (inputs["input_ids"] == 32000).sum() == 196
    assert inputs["input_ids"][0, 0] == loaded.tokenizer.bos_token_id
    assert inputs["pixel_values"].shape == (1, 3, 224, 224)


def test_a_chat_prompt_starts_with_one_bos(loaded, images):
    chat = [{"role": "user", "content": [{"type": "image", "image": images[0]}, {"type": "text", "text": "Why?"}]}]
    inputs = loaded.processor.apply_chat_template(chat, tokenize=True, return_dict=True, return_tensors="pt")
    assert (inputs["input_ids"] == loaded.tokenizer.bos_token_id).sum() == 1


def test_images_and_placeholders_must_be_as_many(loaded, images):
    with pytest.raises(ValueError, match=r"1 <image> tokens and 2 images"):
        loaded.processor(text="<image> Why?", images=images[:2])
    with pytest.raises(ValueError, match=r"1 <image> tokens in the text but no images"):
        loaded.processor(text="<image> Why?")


def test_truncation_never_cuts_image_tokens_silently(loaded, images):
    with pytest.raises(ValueError, match="Mismatch in `image` token count"):
        loaded.processor(text="<image> Why?", images=images[0], truncation=True, max_length=100)


def test_token_types_tell_image_from_text(loaded, images):
    inputs = loaded.processor(text="<image> Why?", images=images[0], return_mm_token_type_ids=True, return_tensors="pt")
    assert torch.equal(inputs["mm_token_type_ids"].bool(), inputs["input_ids"] == 32000)


def test_a_tokenizer_without_the_image_token_is_refused(loaded, hub_cache):
    from transformers import AutoTokenizer

    with pytest.raises(ValueError, match="no token '<image>'"):
        MoeLlavaProcessor(loaded.image_processor, AutoTokenizer.from_pretrained(TINYLLAMA), num_image_tokens=196)


def test_a_saved_processor_comes_back_equal(loaded, images, tmp_path):
    loaded.processor.save_pretrained(tmp_path)
    again = MoeLlavaProcessor.from_pretrained(tmp_path)
    assert again.num_image_tokens == 196
    assert again.chat_template == loaded.processor.chat_template
    before, after = (p(text="<image> Why?", images=images[0], return_tensors="pt") for p in (loaded.processor, again))
    assert all(torch.equal(before[key], after[key]) for key in before)
