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
    chat = [
        {
            "role": "user",
            "content": [{"type": "image", "image": images[0]}, {"type": "text", "text": "Why?"}],
        }
    ]
    inputs = loaded.processor.apply_chat_template(
        chat, tokenize=True, return_dict=True, return_tensors="pt"
    )
    assert (inputs["input_ids"] == loaded.tokenizer.bos_token_id).sum() == 1


def test_images_and_placeholders_must_be_as_many(loaded, images):
    with pytest.raises(ValueError, match=r"1 <image> tokens and 2 images"):
        loaded.processor(text="<image> Why?", images=images[:2])
    with pytest.raises(ValueError, match=r"1 <image> tokens in the text but no images"):
        loaded.processor(text="<image> Why?")


def test_named_templates_are_chosen_by_name(loaded):
    chat = [
        {"role": "user", "content": [{"type": "image"}]},
        {"role": "assistant", "content": "A CT."},
    ]
    assert loaded.processor.apply_chat_template(chat, chat_template="plain") == "<image>A CT.\n"
    assert loaded.processor.apply_chat_template(chat, "vicuna_v1").endswith(
        "USER: <image>\n ASSISTANT: A CT.</s>"
    )


def test_token_types_tell_image_from_text(loaded, images):
    inputs = loaded.processor(
        text="<image> Why?", images=images[0], return_mm_token_type_ids=True, return_tensors="pt"
    )
    assert torch.equal(inputs["mm_token_type_ids"].bool(), inputs["input_ids"] == 32000)


def test_images_of_any_size_take_the_placeholders_that_a_prompt_gets(loaded, images):
    sizes = [(image.height, image.width) for image in images]
    counts = loaded.processor._get_num_multimodal_tokens(image_sizes=sizes)  # what vLLM asks
    prompts = loaded.processor(text=["<image>"] * 3, images=images)["input_ids"]
    assert counts["num_image_tokens"] == [ids.count(32000) for ids in prompts] == [196] * 3
    assert counts["num_image_patches"] == [1] * 3


def test_ids_are_decoded_by_the_processor(loaded):
    ids = loaded.tokenizer(["Is this a CT image?", "Why?"]).input_ids
    assert loaded.processor.batch_decode(ids, skip_special_tokens=True) == [
        "Is this a CT image?",
        "Why?",
    ]


def test_a_tokenizer_without_the_image_token_is_refused(loaded, hub_cache):
    from transformers import AutoTokenizer

    with pytest.raises(ValueError, match="no token '<image>'"):
        MoeLlavaProcessor(
            loaded.image_processor, AutoTokenizer.from_pretrained(TINYLLAMA), num_image_tokens=196
        )


def test_a_saved_processor_comes_back_equal(loaded, images, tmp_path):
    loaded.processor.save_pretrained(tmp_path)
    again = MoeLlavaProcessor.from_pretrained(tmp_path)
    assert again.num_image_tokens == 196
    assert again.chat_template == loaded.processor.chat_template
    before, after = (
        p(text="<image> Why?", images=images[0], return_tensors="pt")
        for p in (loaded.processor, again)
    )
    assert all(torch.equal(before[key], after[key]) for key in before)


@pytest.mark.parametrize("name", ["CT_small.dcm", "examples_palette.dcm"])
def test_a_dicom_file_is_an_image_like_any_other(loaded, name):
    from pydicom.data import get_testdata_file

    from moellava.images import load_image

    path = str(get_testdata_file(name, download=False))
    chat = [
        {
            "role": "user",
            "content": [{"type": "image", "image": path}, {"type": "text", "text": "Why?"}],
        }
    ]
    options = {"tokenize": True, "return_dict": True, "return_tensors": "pt"}
    of_path = loaded.processor.apply_chat_template(chat, **options)
    expected = loaded.processor(text="<image> Why?", images=load_image(path), return_tensors="pt")
    assert torch.equal(of_path["pixel_values"], expected["pixel_values"])


def test_transformers_own_processors_get_images_that_they_can_read(loaded, hub_cache, tmp_path):
    """CLIP's processor clamps 16-bit grey to white and knows no NIfTI; arrays stay its own
    business.
    """
    import nibabel
    import numpy as np
    from PIL import Image
    from transformers import AutoImageProcessor

    from moellava.images import load_image
    from moellava.testing import OPENAI_CLIP

    clip = AutoImageProcessor.from_pretrained(OPENAI_CLIP)
    processor = MoeLlavaProcessor(clip, loaded.tokenizer, num_image_tokens=49, chat_template=None)
    ramp = np.linspace(0, 65535, 64 * 64).astype(np.uint16).reshape(64, 64)
    Image.fromarray(ramp).save(tmp_path / "a.png")
    nibabel.save(nibabel.Nifti1Image(ramp[:, :, None], np.eye(4)), tmp_path / "a.nii.gz")
    for source in (tmp_path / "a.png", str(tmp_path / "a.nii.gz"), Image.fromarray(ramp)):
        pixels = processor(text="<image> Why?", images=[[source]], return_tensors="pt")[
            "pixel_values"
        ]
        expected = clip(load_image(source), return_tensors="pt")["pixel_values"]
        assert torch.equal(pixels, expected)
        assert pixels.std() > 0.5
    array = np.asarray(load_image(ramp))
    pixels = processor(text="<image> Why?", images=array, return_tensors="pt")["pixel_values"]
    assert torch.equal(pixels, clip(array, return_tensors="pt")["pixel_values"])
