"""`explain` on whole models: answers, phases, several images, models without a grid or experts."""

import numpy as np
import pytest
import torch
from PIL import Image

from moellava.explain import explain, write_page

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
        (None, QUESTION, {"max_new_tokens": 5000}, r"the context holds 2048: \d+ too many"),
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
