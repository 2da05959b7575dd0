"""Words on patches: drawing, and the pointing game."""

import numpy as np
import pytest
import torch
from PIL import Image

from moellava.encoders import BiomedClipImageProcessor
from moellava.explain import draw_words
from moellava.explain.frames import Frame
from moellava.explain.words import points_inside, text_contrast


class FindsBright:
    """An encoder that finds "bright" where it is bright, and "dark" elsewhere."""

    image_processor = BiomedClipImageProcessor.from_open_clip({}, 56)

    def patch_similarity(self, image, texts, *, attention="own"):
        pixels = self.image_processor([image], return_tensors="pt")["pixel_values"][0, 0]
        bright = (pixels - pixels.min()).unflatten(0, (7, 8)).unflatten(2, (7, 8)).mean((1, 3))
        return torch.stack([bright if text == "bright" else -bright for text in texts])


@pytest.fixture
def spotted():
    image = Image.new("RGB", (140, 70))
    image.paste((255, 255, 255), (65, 20, 75, 30))  # one patch
    return image


def test_words_are_drawn_on_the_original_picture(spotted, tmp_path):
    figure = draw_words(FindsBright(), spotted, ["bright", "dark"], path=tmp_path / "words.png")
    titles = [panel.get_title() for panel in figure.axes[:2]]
    means = [float(title.split("(")[1].rstrip(")")) for title in titles]
    assert [title.split(" ")[0] for title in titles] == ["bright", "dark"]
    assert means[0] == -means[1] > 0
    drawn = figure.axes[0].images[1].get_array()
    row, column = np.unravel_index(drawn[..., 3].argmax(), drawn.shape[:2])
    assert 65 <= column < 75
    assert 20 <= row < 30
    assert (tmp_path / "words.png").stat().st_size > 1000


def test_texts_are_compared_with_each_other():
    similarity = np.array([[[1, 2]], [[3, 2]]], dtype=np.float32)
    np.testing.assert_array_equal(text_contrast(similarity), [[[-1, 0]], [[1, 0]]])
    np.testing.assert_array_equal(text_contrast(similarity[:1]), [[[-0.5, 0.5]]])


def test_the_pointing_game():
    frame = Frame(left=50, top=0, right=150, bottom=100, width=200, height=100)
    mask = np.zeros((100, 200), dtype=bool)
    mask[:50, 100:150] = True  # the upper right quarter of what is seen
    assert points_inside(np.array([[0, 1], [0, 0]], dtype=np.float32), frame, mask)
    assert not points_inside(np.array([[1, 0], [0, 0]], dtype=np.float32), frame, mask)
    padded = Frame(left=0, top=-100, right=200, bottom=100, width=200, height=100)
    assert not points_inside(np.array([[1], [0]], dtype=np.float32), padded, mask)
