import copy
import dataclasses
import io
import pickle

import numpy as np
import pytest
import torch
from pydicom.data import get_testdata_file

from moellava.explain import explain
from moellava.images import load_image
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

    from moellava.images import load_image

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
    message = (
        r"Prompt 2 has 2\d\d tokens \(196 of images, \d+ of text\) and max_new_tokens is 2000, "
        r".* holds 2048: \d+ "
    )
    with pytest.raises(ValueError, match=message + "tokens would be cut"):
        loaded.answer(images[0], ["Why?", "What is this image?"], max_new_tokens=2000)


def test_an_unreadable_image_is_named(loaded, tmp_path):
    path = tmp_path / "broken.png"
    path.write_bytes(b"\x89PNG\r\n\x1a\n broken")
    with pytest.raises(ValueError, match=r"broken\.png cannot be read as an image"):
        loaded.answer(path, "What is this?")
    with pytest.raises(FileNotFoundError, match=r"missing\.png does not exist"):
        loaded.answer(tmp_path / "missing.png", "What is this?")


class TestImages:
    """Everything that is an image is one image of one prompt."""

    @pytest.fixture(scope="class")
    def picture(self, images):
        return images[0].convert("RGB").resize((40, 32))

    @pytest.fixture(scope="class")
    def forms(self, picture):
        array = np.asarray(picture)
        file = io.BytesIO()
        picture.save(file, "PNG")
        return {
            "array": array,
            "channels first": array.transpose(2, 0, 1),
            "tensor": torch.from_numpy(array.copy()).permute(2, 0, 1),
            "bytes": file.getvalue(),
            "open file": io.BytesIO(file.getvalue()),
        }

    @pytest.mark.parametrize("form", ["array", "channels first", "tensor", "bytes", "open file"])
    def test_it_answers_as_for_the_picture(self, loaded, picture, forms, form):
        expected = loaded.answer(picture, ["What?", "Why?"], max_new_tokens=3)
        assert loaded.answer(forms[form], ["What?", "Why?"], max_new_tokens=3) == expected

    def test_a_dicom_dataset_is_seen_through_the_window_that_is_asked_for(self, loaded):
        pydicom = pytest.importorskip("pydicom")
        from pydicom.data import get_testdata_file

        path = get_testdata_file("CT_small.dcm", download=False)
        dataset = pydicom.dcmread(path)
        seen = []
        processor = copy.copy(loaded.processor)
        watched = dataclasses.replace(loaded, processor=processor)
        own = type(processor).__call__

        class Watching(type(processor)):
            def __call__(self, images=None, **kwargs):
                seen.append(np.asarray(images[0]))
                return own(self, images=images, **kwargs)

        processor.__class__ = Watching
        for image, window in ((path, "lung"), (dataset, "lung"), (dataset, None)):
            watched.answer(image, "What?", window=window, max_new_tokens=1)
        assert np.array_equal(seen[0], seen[1])
        assert not np.array_equal(seen[1], seen[2])

    def test_something_else_is_refused_by_its_type(self, loaded):
        with pytest.raises(TypeError, match="object"):
            loaded.answer(object(), "What?")


class TestQuestions:
    def test_messages_are_a_conversation(self, loaded, images):
        messages = [
            {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What?"}]},
            {"role": "assistant", "content": "A CT."},
            {"role": "user", "content": "Sure?"},
        ]
        with_picture = [dict(turn) for turn in messages]
        with_picture[0] = {
            "role": "user",
            "content": [{"type": "image", "image": images[0]}, {"type": "text", "text": "What?"}],
        }
        first = loaded.answer(images[0], messages, max_new_tokens=5)
        assert len(first) == 1
        assert loaded.answer(None, with_picture, max_new_tokens=5) == first
        both = loaded.answer([images[0], None], [messages, "Hello?"], max_new_tokens=5)
        assert both[0] == first[0]
        assert "image" not in messages[0]["content"][0]

    def test_an_image_item_is_seen_through_its_own_window(self, loaded):
        scan = get_testdata_file("CT_small.dcm", download=False)
        items = [{"type": "image", "image": scan, "window": "lung"}, {"type": "image"}]
        message = {"role": "user", "content": [*items, {"type": "text", "text": "What?"}]}
        found = loaded.answer([scan], [message], window="bone", max_new_tokens=5)
        seen = [load_image(scan, window=window) for window in ("lung", "bone")]
        assert found == loaded.answer(seen, "What?", max_new_tokens=5)
        other = [load_image(scan, window="bone")] * 2  # the oracle can say no
        assert found != loaded.answer(other, "What?", max_new_tokens=5)

    def test_a_string_is_a_conversation_of_one_turn(self, loaded, images):
        message = [{"role": "user", "content": "What is this?"}]
        expected = loaded.answer(images[0], "What is this?", max_new_tokens=5)
        assert loaded.answer(images[0], message, max_new_tokens=5) == expected

    def test_images_and_places_must_be_as_many(self, loaded, images):
        messages = [{"role": "user", "content": [{"type": "image"}]}]
        with pytest.raises(ValueError, match="1 image items without an image, but 2 images"):
            loaded.answer(images[:2], messages)

    @pytest.mark.parametrize("question", [3, [3], [{"content": "x"}]])
    def test_anything_else_is_a_type_error(self, loaded, question):
        with pytest.raises(TypeError, match=r"question|message"):
            loaded.answer(None, question)

    def test_no_question_has_no_answer(self, loaded):
        assert loaded.answer(None, []) == []

    @pytest.mark.parametrize("own", ["mistral", "none"])
    def test_the_beginning_of_text_stands_once(self, loaded, images, monkeypatch, own):
        processor = copy.copy(loaded.processor)
        if own == "mistral":
            processor.chat_template = (
                "{{ bos_token }}{% for m in messages %}[INST] {% for i in m['content'] %}"
                "{{ '<image>' if i['type'] == 'image' else i['text'] }}{% endfor %} [/INST]"
                "{% endfor %}"
            )
        else:
            processor.chat_template = processor.chat_template.removeprefix("{{- bos_token -}}")
        seen = []
        generate = loaded.model.generate
        monkeypatch.setattr(
            loaded.model,
            "generate",
            lambda **inputs: seen.append(inputs["input_ids"]) or generate(**inputs),
        )
        again = dataclasses.replace(loaded, processor=processor)
        again.answer(images[0], ["What?", "What is this, please?"], max_new_tokens=1)
        counts = (seen[0] == loaded.tokenizer.bos_token_id).sum(dim=1)
        assert counts.tolist() == [1, 1]


class TestGeneration:
    def test_scores_may_be_asked_for(self, loaded):
        plain = loaded.answer(None, "What?", max_new_tokens=4)
        found = loaded.answer(
            None, "What?", max_new_tokens=4, return_dict_in_generate=True, output_scores=True
        )
        assert found == plain

    def test_an_unknown_option_suggests_the_nearest(self, loaded):
        with pytest.raises(TypeError, match=r"'max_new_token'\. Did you mean 'max_new_tokens'"):
            loaded.answer(None, "What?", max_new_token=3)

    def test_generating_warns_of_no_second_limit(self, loaded, caplog):
        batch = loaded.processor(text=["What?"], return_tensors="pt")
        loaded.model.generate(**batch, max_new_tokens=2)
        assert "max_length" not in caplog.text


class TestNonFinite:
    """Weights that turned NaN after they were read, or a dtype too narrow for what is computed."""

    @pytest.fixture(params=["model.norm.weight", "multi_modal_projector.0.bias"])
    def spoilt(self, loaded, request):
        (weight,) = (
            value for name, value in loaded.model.named_parameters() if name.endswith(request.param)
        )
        whole = weight.detach().clone()
        with torch.no_grad():
            weight[3] = float("nan") if "norm" in request.param else float("inf")
        yield loaded
        with torch.no_grad():
            weight.copy_(whole)

    ASKERS = {
        "answer": lambda loaded, image: loaded.answer(image, "What?", max_new_tokens=2),
        "beams": lambda loaded, image: loaded.answer(image, "What?", max_new_tokens=2, num_beams=2),
        "samples": lambda loaded, image: loaded.answer(
            image, "What?", max_new_tokens=2, do_sample=True, temperature=0.5
        ),
        "stream": lambda loaded, image: list(
            loaded.stream(
                [{"role": "user", "content": [{"type": "image", "image": image}]}],
                max_new_tokens=2,
            )
        ),
        "explain": lambda loaded, image: explain(loaded, image, "What?", answer="A lung."),
    }

    @pytest.mark.parametrize("ask", ASKERS)
    def test_it_is_an_error_and_not_an_answer(self, spoilt, images, ask):
        with pytest.raises(ValueError, match="The model gives NaN or infinity"):
            self.ASKERS[ask](spoilt, images[0])

    def test_tokens_that_are_forbidden_are_not_an_error(self, loaded, images):
        options = {"suppress_tokens": list(range(500)), "bad_words_ids": [[600]]}
        assert loaded.answer(images[0], "What?", max_new_tokens=2, **options)
