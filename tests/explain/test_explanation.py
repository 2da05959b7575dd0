"""Maps of an explanation, and its pictures."""

import numpy as np
import pytest
from PIL import Image

from moellava.explain import KINDS, write_page


@pytest.mark.parametrize("kind", KINDS)
def test_every_map_has_a_place_on_the_picture(explanation, kind):
    values = explanation.map(kind)
    assert values.shape == ((10, 10) if kind in ("attention", "rollout") else (2, 3))
    placed = explanation.on_picture(values)
    assert placed.shape == (180, 300)
    assert np.isnan(placed[:, :58]).all()  # 60 pixels on either side are cropped away
    assert np.isfinite(placed[:, 62:238]).all()


def test_a_map_is_the_mean_over_layers_heads_and_tokens(explanation):
    whole = explanation.attention.mean((0, 1, 2)).reshape(10, 10)
    np.testing.assert_allclose(explanation.map(), whole, rtol=1e-5)
    one = explanation.attention[2, 3, 1].reshape(10, 10)
    np.testing.assert_allclose(explanation.map(layer=2, head=3, token=1), one)


def test_the_ablation_of_all_tokens_is_the_sum(explanation):
    parts = [explanation.map("ablation", token=token) for token in range(len(explanation.tokens))]
    np.testing.assert_allclose(explanation.map("ablation"), np.sum(parts, axis=0), atol=1e-6)


def test_the_blank_image_has_maps_of_its_own(explanation):
    blank = explanation.map(blank=True)
    assert blank.shape == (10, 10)
    assert not np.allclose(blank, explanation.map())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"kind": "attenton"}, "Unknown map 'attenton'. Did you mean 'attention'"),
        ({"kind": "rollout", "layer": 1}, "layer and head are of 'attention'"),
        ({"kind": "gradient", "token": 0}, "leave token out"),
        ({"kind": "ablation", "blank": True}, "compares with the blank image"),
    ],
)
def test_a_map_that_cannot_be(explanation, options, message):
    with pytest.raises(ValueError, match=message):
        explanation.map(**options)


def test_image_share_is_part_of_a_whole(explanation):
    share = explanation.image_share()
    assert share.shape == (4, 4)
    assert (share > 0).all()
    assert (share < 1).all()


@pytest.mark.parametrize("kind", KINDS)
def test_overlays_are_written(explanation, kind, tmp_path):
    figure = explanation.draw_overlay(tmp_path / "map.png", kind=kind)
    has_blank = kind in ("attention", "rollout")
    assert len(figure.axes) == (4 if has_blank else 3)  # panels and a colour bar
    with Image.open(tmp_path / "map.png") as written:
        assert min(written.size) > 200


def test_the_hot_patch_of_a_figure_is_on_its_pixels(explanation):
    """Read from what matplotlib draws, not from the numbers that were given to it."""
    from moellava.explain.drawing.overlays import draw_overlay

    values = np.zeros((10, 10), dtype=np.float32)
    values[3, 7] = 1
    figure = draw_overlay(
        Image.new("RGB", (300, 180)),
        explanation.frames[0],
        values,
        None,
        title="",
        label="",
        is_signed=False,
    )
    drawn = figure.axes[1].images[1]
    colours = drawn.get_array()
    rows, columns = np.nonzero(colours[..., 3] > 0.6)
    assert drawn.get_extent() == [0, 300, 180, 0]
    # Patches are 18 pixels, and the crop starts at 60.
    assert (columns.min(), columns.max() + 1) == pytest.approx((60 + 7 * 18, 60 + 8 * 18), abs=2)
    assert (rows.min(), rows.max() + 1) == pytest.approx((3 * 18, 4 * 18), abs=2)


@pytest.mark.parametrize("size", [(1200, 150), (150, 1200)], ids=["wide", "tall"])
def test_a_long_picture_fits_a_page(size):
    from moellava.explain.drawing.overlays import draw_overlay
    from moellava.explain.frames import Frame

    frame = Frame(left=0, top=0, right=size[0], bottom=size[1], width=size[0], height=size[1])
    values = np.eye(4, dtype=np.float32)
    figure = draw_overlay(
        Image.new("RGB", size), frame, values, values, title="", label="", is_signed=False
    )
    assert figure.get_figwidth() < 10
    assert figure.get_figheight() < 8


def test_both_maps_share_one_scale(explanation):
    figure = explanation.draw_overlay()
    largest = max(explanation.map().max(), explanation.map(blank=True).max())
    assert figure.axes[-1].get_ylim() == pytest.approx((0, largest))


def test_the_load_is_drawn_with_counts_and_the_even_line(explanation):
    figure = explanation.draw_load()
    panels = figure.axes[:3]
    assert [panel.get_title(loc="left").split(":")[0] for panel in panels] == [
        "image",
        "question",
        "answer",
    ]
    counts = explanation.routing.counts("image")
    texts = [int(text.get_text()) for text in panels[0].texts]
    assert sorted(texts) == sorted(counts[counts > 0].tolist())
    even = panels[0].lines[0].get_ydata()
    assert set(even) == {1 / explanation.routing.num_experts}


def test_pathways_are_drawn_for_every_phase(explanation, tmp_path):
    figure = explanation.draw_pathways(tmp_path / "paths.png")
    num_layers = len(explanation.routing.layers)
    for panel, phase in zip(figure.axes, ("image", "question", "answer"), strict=True):
        flows = explanation.routing.flows(phase)
        assert len(panel.collections) == (flows >= 0.005).sum() + num_layers
    assert (tmp_path / "paths.png").stat().st_size > 1000


def test_numbers_survive_a_file(explanation, tmp_path):
    numbers = explanation.to_dict()
    assert numbers["answer"] == explanation.answer
    arrays = {name: value for name, value in numbers.items() if isinstance(value, np.ndarray)}
    np.savez(tmp_path / "numbers.npz", **arrays)
    with np.load(tmp_path / "numbers.npz") as read:
        np.testing.assert_array_equal(read["attention"], explanation.attention)
    assert numbers["routing"]["experts"].shape == explanation.routing.experts.shape


def test_the_page_needs_no_other_file(explanation, tmp_path):
    page = write_page(explanation, tmp_path / "out")
    text = page.read_text()
    written = {path.stem for path in page.parent.glob("*.png")}
    assert written == {*KINDS, "tokens", "heads", "load", "pathways"}
    assert text.count("data:image/png;base64,") == len(written)
    assert 'src="http' not in text
    assert "href" not in text
    assert explanation.answer in text


def test_a_page_escapes_what_was_asked(explanation, tmp_path):
    from dataclasses import replace

    odd = replace(explanation, question="Is a < b? <script>alert(1)</script> $answer")
    text = write_page(odd, tmp_path).read_text()
    assert "<script>" not in text
    assert "&lt;script&gt;alert(1)&lt;/script&gt; $answer" in text
