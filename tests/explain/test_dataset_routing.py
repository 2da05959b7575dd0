"""Routing over rows, against single explanations of the same rows."""

import json

import numpy as np
import pytest
from PIL import Image

from moellava.data import Row, Turn
from moellava.explain import PHASES, explain, route_dataset
from moellava.explain.dataset_routing import group_of


def make_row(number, picture, modality, question="What is this?", answer="a lung"):
    turns = (Turn("user", f"<image>\n{question}"), Turn("assistant", answer))
    return Row(
        id=str(number), images=(picture,), turns=turns, source="test", extra={"modality": modality}
    )


@pytest.fixture(scope="module")
def rows():
    """Dark and bright pictures, two rows of each."""
    rng = np.random.default_rng(0)
    rows = []
    for number in range(8):
        level = 40 if number % 2 else 215
        values = np.clip(rng.normal(level, 15, (32, 32, 3)), 0, 255).astype(np.uint8)
        picture = Image.fromarray(values)
        modality = "CT" if number % 2 else "MR"
        rows.append(make_row(2 * number, picture, modality))
        rows.append(make_row(2 * number + 1, picture, modality, "Which organ can be seen here?"))
    return rows


@pytest.fixture(scope="module")
def result(loaded, rows):
    return route_dataset(loaded, rows, group_by="modality", batch_size=3, num_resamples=100)


def test_loads_are_the_mean_of_single_explanations(loaded, rows, result):
    own = [row for row in rows if row.extra["modality"] == "CT"]
    loads = {phase: [] for phase in PHASES}
    for row in own:
        explanation = explain(
            loaded, row.images[0], row.question, answer=f"{row.answer}</s>", blank=False
        )
        for phase in ("image", "answer"):
            loads[phase].append(explanation.routing.load(phase))
    image_load = result.load["image"]["CT"][0]
    np.testing.assert_allclose(image_load, np.mean(loads["image"], axis=0), atol=1e-5)
    assert result.num_rows == {"CT": 8, "MR": 8}
    assert result.num_images == {"CT": 4, "MR": 4}


def test_loads_are_shares_within_their_intervals(result):
    for groups in result.load.values():
        for load, low, high in groups.values():
            np.testing.assert_allclose(load.sum(-1), 1, rtol=1e-5)
            assert (low <= load + 1e-6).all()
            assert (high >= load - 1e-6).all()


def test_the_batch_does_not_matter(loaded, rows, result):
    again = route_dataset(loaded, rows, group_by="modality", batch_size=16, num_resamples=10)
    for phase in PHASES:
        np.testing.assert_allclose(
            again.load[phase]["MR"][0], result.load[phase]["MR"][0], atol=1e-5
        )


def test_two_experts_of_a_token_are_active_together(loaded, result):
    k = loaded.model.config.text_config.num_experts_per_tok
    for pairs in result.coactivation.values():
        np.testing.assert_allclose(pairs, pairs.transpose(0, 2, 1))
        alone = np.trace(pairs, axis1=1, axis2=2)
        np.testing.assert_allclose(alone, k, rtol=1e-5)  # each token goes to k experts
        np.testing.assert_allclose(pairs.sum((1, 2)), k * k, rtol=1e-5)


def test_groups_that_look_different_are_told_apart(result):
    for layer in result.information["image"]:
        assert 0 <= layer.bits <= 1
        assert layer.p_value <= 1
    found = result.information["image"][0]
    assert found.bits > found.shuffled_mean


def test_json_and_picture(result, tmp_path):
    text = json.dumps(result.to_dict())
    assert (
        json.loads(text)["load"]["image"]["CT"]["load"]
        == result.to_dict()["load"]["image"]["CT"]["load"]
    )
    assert "does not show" in text
    figure = result.draw(tmp_path / "routing.png")
    assert len(figure.axes) == len(PHASES) * len(result.layers)
    assert (tmp_path / "routing.png").stat().st_size > 1000
    first = result.information["image"][0]
    assert f"{first.bits:.3f} bits" in figure.axes[0].get_title()
    together = result.draw_coactivation(tmp_path / "together.png")
    shown = [float(text.get_text()) for text in together.axes[0].texts]
    off_diagonal = result.coactivation["image"][0][~np.eye(4, dtype=bool)]
    np.testing.assert_allclose(shown, off_diagonal, atol=0.006)
    assert (tmp_path / "together.png").stat().st_size > 1000


def test_rows_without_images_are_routed_too(loaded):
    turns = (Turn("user", "What is a lung?"), Turn("assistant", "an organ"))
    rows = [Row(id=str(number), images=(), turns=turns, answer_type="OPEN") for number in range(3)]
    result = route_dataset(loaded, rows, group_by="answer_type", num_resamples=5)
    assert result.num_images == {"OPEN": 3}
    assert np.isnan(result.load["image"]["OPEN"][0]).all()
    assert np.isfinite(result.load["question"]["OPEN"][0]).all()
    assert "NaN" not in json.dumps(result.to_dict())


def test_fields_of_rows(rows):
    assert group_of(rows[0], "modality") == "MR"
    assert group_of(rows[0], "source") == "test"
    with pytest.raises(ValueError, match=r"field of row 0: 'modalty'\. Did you mean 'modality'"):
        group_of(rows[0], "modalty")


def test_what_cannot_be_routed(build, loaded, rows):
    with pytest.raises(ValueError, match="no rows"):
        route_dataset(loaded, [], group_by="modality")
    with pytest.raises(ValueError, match="no experts of moellava's"):
        route_dataset(build(moe_config=False), rows, group_by="modality")
