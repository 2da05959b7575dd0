"""`explain` on whole models: answers, phases, several images, models without a grid or experts."""

import numpy as np
import pytest
import torch
from PIL import Image

from moellava.explain import Explanation, explain, explain_answer, write_page

QUESTION = "What organ is shown?"


def test_the_answer_is_that_of_answer(loaded, picture):
    explanation = explain(loaded, picture, QUESTION, max_new_tokens=6)
    assert explanation.answer == loaded.answer(picture, QUESTION, max_new_tokens=6)[0]
    assert "".join(explanation.tokens).strip() == explanation.answer
    num_tokens = len(explanation.tokens)
    assert explanation.attention.shape == (4, 4, num_tokens, 100)
    assert explanation.blank_attention.shape == explanation.attention.shape
    assert explanation.logprobs.shape == (num_tokens,)
    assert explanation.ablation is None
    assert explanation.gradient is None


def test_it_is_a_method_of_the_loaded_model(loaded, picture):
    options = {"max_new_tokens": 3, "blank": False, "gradient": True, "blocks": (1, 2)}
    found, expected = (
        loaded.explain(picture, QUESTION, **options),
        explain(loaded, picture, QUESTION, **options),
    )
    assert isinstance(found, Explanation)
    assert found.answer == expected.answer
    np.testing.assert_array_equal(found.gradient, expected.gradient)


def test_what_generation_shows_is_what_a_second_pass_shows(loaded, picture, monkeypatch):
    options = {"max_new_tokens": 5, "min_new_tokens": 5, "blank": False}
    found = explain(loaded, picture, QUESTION, **options)
    monkeypatch.setattr(explain_answer, "has_whole_cache", lambda model: False)
    expected = explain(loaded, picture, QUESTION, **options)
    assert found.tokens == expected.tokens
    for name in ("attention", "rollout", "logprobs"):
        np.testing.assert_allclose(
            getattr(found, name), getattr(expected, name), rtol=1e-3, atol=1e-6
        )
    assert found.routing.phases == expected.routing.phases
    np.testing.assert_array_equal(found.routing.experts, expected.routing.experts)
    np.testing.assert_allclose(found.routing.weights, expected.routing.weights, rtol=1e-3)


@pytest.mark.parametrize(
    "options",
    [
        {"num_beams": 2},
        {"use_cache": False},
        {"cache_implementation": "static"},
        {"stop_strings": "?"},  # replaced by a piece of the answer
    ],
    ids=lambda options: next(iter(options)),
)
def test_every_way_of_generating_is_explained(loaded, picture, options):
    options = {"max_new_tokens": 6, **options}
    if "stop_strings" in options:
        whole = loaded.answer(picture, QUESTION, max_new_tokens=6)[0]
        options["stop_strings"] = whole[len(whole) // 2 :]
    explanation = explain(loaded, picture, QUESTION, **options)
    assert explanation.answer == loaded.answer(picture, QUESTION, **options)[0]
    assert explanation.attention.shape[2] == len(explanation.tokens) == len(explanation.logprobs)
    assert explanation.routing.experts.shape[1] == len(explanation.routing.tokens)


def test_a_turn_of_a_conversation_is_explained(loaded, picture):
    messages = [
        {"role": "user", "content": [{"type": "image", "image": picture}, as_text(QUESTION)]},
        {"role": "assistant", "content": "a lung"},
        {"role": "user", "content": "Which side?"},
    ]
    explanation = loaded.explain(None, messages, max_new_tokens=4, blank=False)
    assert explanation.question == "Which side?"
    assert explanation.answer == loaded.answer(None, messages, max_new_tokens=4)[0]
    assert explanation.attention.shape[-1] == 100
    assert explanation.routing.phases.count("question") > 20  # earlier turns are part of it
    with pytest.raises(ValueError, match="There is no image"):
        loaded.explain(None, QUESTION)


def as_text(text):
    return {"type": "text", "text": text}


def test_an_answer_of_ones_own_has_the_tokens_of_training(loaded, explanation):
    assert explanation.answer == "the left lung"
    assert explanation.routing.phases.count("answer") == len(explanation.tokens)
    assert explanation.routing.phases.count("image") == 100
    assert len(explanation.routing.tokens) == len(explanation.routing.phases)
    assert explanation.routing.experts.shape[1] == len(explanation.routing.phases)
    assert explanation.routing.layers == (0, 2)


def test_two_images_have_their_own_maps(loaded, picture):
    tall = picture.transpose(Image.Transpose.ROTATE_90)
    explanation = explain(
        loaded, [picture, tall], QUESTION, answer="lung", ablation=True, blocks=(2, 2)
    )
    assert explanation.attention.shape[-1] == 200
    assert explanation.frames[0].width == explanation.frames[1].height == 300
    second = explanation.attention.mean((0, 1, 2))[100:].reshape(10, 10)
    np.testing.assert_allclose(explanation.map(image=1), second, rtol=1e-5)
    assert explanation.ablation.shape[1:] == (2, 2, 2)


def test_a_path_and_a_16_bit_picture(loaded, tmp_path):
    values = np.random.default_rng(0).integers(0, 65536, (60, 90), dtype=np.uint16)
    Image.fromarray(values).save(tmp_path / "scan.png")
    explanation = explain(loaded, tmp_path / "scan.png", QUESTION, answer="lung", blank=False)
    shown = np.asarray(explanation.pictures[0])
    assert shown.shape == (60, 90, 3)
    np.testing.assert_allclose(shown[..., 0], values / 257, atol=0.51)
    assert explanation.blank_attention is None
    with pytest.raises(ValueError, match="no blank map"):
        explanation.map(blank=True)


def test_resampled_tokens_still_have_a_causal_map(build, picture, tmp_path):
    loaded = build(projector_type="perceiver", projector_options={"num_latents": 8})
    explanation = explain(
        loaded, picture, QUESTION, answer="lung", ablation=True, gradient=True, blocks=(2, 2)
    )
    assert explanation.grid is None
    with pytest.raises(ValueError, match=r"perceiver.*8 tokens"):
        explanation.draw_overlay()
    assert explanation.draw_overlay(kind="ablation").axes
    page = write_page(explanation, tmp_path)
    assert {path.stem for path in tmp_path.glob("*.png")} >= {"ablation", "gradient", "load"}
    assert "They have no places" in page.read_text()


def test_a_dense_model_has_no_routes(build, picture):
    explanation = explain(build(moe_config=False), picture, QUESTION, answer="lung")
    assert explanation.routing is None
    with pytest.raises(ValueError, match="no experts of moellava's"):
        explanation.draw_load()


def test_the_model_answers_as_before(loaded, picture):
    before = loaded.answer(picture, QUESTION, max_new_tokens=5)
    explain(
        loaded, picture, QUESTION, max_new_tokens=5, ablation=True, gradient=True, blocks=(1, 2)
    )
    assert loaded.answer(picture, QUESTION, max_new_tokens=5) == before


def test_an_explanation_is_the_same_twice(loaded, picture, explanation):
    again = explain(loaded, picture, QUESTION, answer="the left lung")
    np.testing.assert_array_equal(again.attention, explanation.attention)
    np.testing.assert_array_equal(again.routing.experts, explanation.routing.experts)


@pytest.mark.parametrize(
    ("images", "question", "options", "message"),
    [
        ([], QUESTION, {}, "There is no image"),
        (None, "  ", {}, "The question is empty"),
        (None, QUESTION, {"answer": ""}, "the answer is empty"),
        (None, QUESTION, {"max_new_tokens": 5000}, r"context holds 2048: \d+ tokens would be cut"),
        (None, QUESTION, {"num_return_sequences": 2, "num_beams": 2}, "is of one answer"),
        (None, QUESTION, {"answer": "lung", "max_bytes": 2**20}, "MiB, but max_bytes allows"),
    ],
)
def test_what_cannot_be_explained(loaded, picture, images, question, options, message):
    with pytest.raises(ValueError, match=message):
        explain(loaded, picture if images is None else images, question, **options)


def test_bfloat16_is_recorded_in_float32(build, picture):
    loaded = build()
    loaded.model.to(torch.bfloat16)
    explanation = explain(loaded, picture, QUESTION, answer="lung", gradient=True, ablation=True)
    assert explanation.attention.dtype == np.float32
    assert np.isfinite(explanation.gradient).all()
    whole = explanation.image_share()
    assert (whole < 1.001).all()
