import copy
import dataclasses
import pickle

import pytest
import torch

from moellava.model.loaded_model import LoadedModel


class TestParts:
    def test_it_unpacks_into_four_and_is_indexed_like_them(self, loaded):
        model, image_processor, tokenizer, context_len = loaded
        assert (model, image_processor) == (loaded.model, loaded.processor.image_processor)
        assert (tokenizer, context_len) == (loaded.processor.tokenizer, 2048)
        assert len(loaded) == 4
        assert loaded[0] is model
        assert loaded[-1] == 2048

    @pytest.mark.parametrize(
        "duplicate",
        [copy.copy, copy.deepcopy, lambda loaded: pickle.loads(pickle.dumps(loaded))],
        ids=["copy", "deepcopy", "pickle"],
    )
    def test_a_copy_answers_alike(self, loaded, images, duplicate):
        again = duplicate(loaded)
        assert type(again) is LoadedModel
        assert again.context_len == loaded.context_len
        question = "What is this?"
        found = again.answer(images[0], question, max_new_tokens=5)
        assert found == loaded.answer(images[0], question, max_new_tokens=5)

    def test_one_part_can_be_replaced(self, loaded):
        processor = copy.copy(loaded.processor)
        again = dataclasses.replace(loaded, processor=processor)
        assert again.processor is processor
        assert again.model is loaded.model

    def test_its_repr_is_one_line_that_names_the_parts(self, loaded):
        shown = repr(loaded)
        assert "biomedclip_small + mlp2x_gelu + TinyLlama/TinyLlama-1.1B-Chat-v1.0" in shown
        assert len(shown) < 200
        assert "\n" not in shown


def test_one_image_serves_all_questions(loaded, images):
    questions = ["What is this?", "Is this a CT image?"]
    both = loaded.answer(images[0], questions, max_new_tokens=5)
    assert both == [
        loaded.answer(images[0], question, max_new_tokens=5)[0] for question in questions
    ]


def test_a_prompt_takes_several_images_or_none(loaded, images):
    two, none = loaded.answer([images[:2], None], ["Which differ?", "Hello?"], max_new_tokens=5)
    assert two == loaded.answer(images[:2], "Which differ?", max_new_tokens=5)[0]
    assert none == loaded.answer(None, "Hello?", max_new_tokens=5)[0]


def test_a_path_is_read_as_the_image_it_holds(loaded, images, tmp_path):
    images[0].save(tmp_path / "scan.png")
    from_path = loaded.answer(tmp_path / "scan.png", "What is this?", max_new_tokens=5)
    assert from_path == loaded.answer(images[0], "What is this?", max_new_tokens=5)


def test_a_dicom_file_is_read_as_the_picture_that_it_shows(loaded):
    from pydicom.data import get_testdata_file

    from moellava.data.images import load_image

    path = get_testdata_file("CT_small.dcm", download=False)
    from_path = loaded.answer(path, "What is this?", max_new_tokens=5)
    assert from_path == loaded.answer(load_image(path), "What is this?", max_new_tokens=5)


def test_an_answer_is_the_new_text_only(loaded, images, monkeypatch):
    def generate(input_ids, **kwargs):
        new = loaded.tokenizer(
            " lungs</s>", add_special_tokens=False, return_tensors="pt"
        ).input_ids
        return torch.cat([input_ids, new], dim=1)

    monkeypatch.setattr(loaded.model, "generate", generate)
    assert loaded.answer(images[0], "Which organ is shown?") == ["lungs"]


def test_prompts_are_padded_on_the_left(loaded, images, monkeypatch):
    masks = []
    generate = loaded.model.generate
    monkeypatch.setattr(
        loaded.model,
        "generate",
        lambda **inputs: masks.append(inputs["attention_mask"]) or generate(**inputs),
    )
    loaded.answer(
        images[0],
        ["Why?", "Which organ is shown in the left half of this image?"],
        max_new_tokens=1,
    )
    assert masks[0][0, 0] == 0
    assert masks[0][:, -1].tolist() == [1, 1]


def test_counts_that_differ_are_refused(loaded, images):
    with pytest.raises(ValueError, match="3 images for 2 questions"):
        loaded.answer(images, ["a", "b"])


def test_a_prompt_beyond_the_context_says_what_would_be_cut(loaded, images):
    message = r"Prompt 2 has 2\d\d tokens \(196 of images, \d+ of text\) and max_new_tokens is 2000, .* holds 2048: \d+ "
    with pytest.raises(ValueError, match=message + "tokens would be cut"):
        loaded.answer(images[0], ["Why?", "What is this image?"], max_new_tokens=2000)


def test_an_unreadable_image_is_named(loaded, tmp_path):
    path = tmp_path / "broken.png"
    path.write_bytes(b"\x89PNG\r\n\x1a\n broken")
    with pytest.raises(ValueError, match=r"broken\.png cannot be read as an image"):
        loaded.answer(path, "What is this?")
    with pytest.raises(FileNotFoundError, match=r"missing\.png does not exist"):
        loaded.answer(tmp_path / "missing.png", "What is this?")
