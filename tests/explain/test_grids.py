"""Grids of image tokens, for every projector of the table and for foreign ones."""

import numpy as np
import pytest
import torch
from torch import nn

from moellava.explain.grids import TokenGrid, find_token_grid
from moellava.model.projector import PROJECTORS, register_projector


@pytest.mark.parametrize(
    ("settings", "grid"),
    [
        ({"projector_type": "linear"}, TokenGrid(10, 10)),
        ({"projector_type": "mlp2x_gelu"}, TokenGrid(10, 10)),
        ({"projector_type": "pixel_shuffle"}, TokenGrid(5, 5)),
        (
            {"projector_type": "average_pool", "projector_options": {"factor": 5}},
            TokenGrid(2, 2),
        ),
        ({"vision_feature_select_strategy": "full"}, TokenGrid(10, 10, num_before=1)),
    ],
)
def test_projectors_that_keep_a_grid(build, settings, grid):
    assert find_token_grid(build(**settings).model) == grid


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        (
            {"projector_type": "perceiver", "projector_options": {"num_latents": 9}},
            "perceiver.*makes 9 tokens of 10x10 patches, and these do not divide the grid",
        ),
        (
            {"projector_type": "perceiver", "projector_options": {"num_latents": 100}},
            "perceiver.*100 tokens.*(does not stay at its place|sees the whole image)",
        ),
        (
            {
                "projector_type": "qformer",
                "projector_options": {"num_query_tokens": 25, "hidden_size": 64, "num_layers": 2},
            },
            "qformer.*25 tokens.*(does not stay at its place|sees the whole image)",
        ),
    ],
)
def test_resampled_tokens_are_refused_with_the_reason(build, settings, reason):
    with pytest.raises(ValueError, match=reason):
        find_token_grid(build(**settings).model)


class Blur(nn.Module):
    """A projector that mixes neighbours, as those with convolutions do."""

    def __init__(self, shape):
        super().__init__()
        self.shape = shape
        self.linear = nn.Linear(shape.vision_width, shape.text_width)

    def forward(self, patch_tokens):
        image = patch_tokens.transpose(1, 2).unflatten(2, self.shape.grid)
        blurred = 0.8 * image + 0.2 * nn.functional.avg_pool2d(image, 3, 1, 1)
        return self.linear(blurred.flatten(2).transpose(1, 2))


class Turned(nn.Module):
    """A projector that writes the patches in another order."""

    def __init__(self, shape):
        super().__init__()
        self.linear = nn.Linear(shape.vision_width, shape.text_width)

    def forward(self, patch_tokens):
        return self.linear(patch_tokens.flip(1))


@pytest.fixture
def foreign(monkeypatch):
    monkeypatch.setattr("moellava.model.projector.PROJECTORS", dict(PROJECTORS))
    for name, module in (("blur", Blur), ("turned", Turned)):
        register_projector(name, module, num_tokens=lambda shape: shape.num_patches)


def test_a_foreign_projector_is_asked(build, foreign):
    assert find_token_grid(build(projector_type="blur").model) == TokenGrid(10, 10)
    with pytest.raises(ValueError, match="does not stay at its place"):
        find_token_grid(build(projector_type="turned").model)


def test_synthesized_tokens_are_refused(loaded, monkeypatch):
    monkeypatch.setattr(loaded.model.model.vision_tower.config, "patch_tokens", "synthesized")
    with pytest.raises(ValueError, match="synthesized: one pooled vector, repeated"):
        find_token_grid(loaded.model)


def test_maps_leave_the_class_token_out():
    values = np.arange(2 * 7, dtype=np.float32).reshape(2, 7)
    maps = TokenGrid(2, 3, num_before=1).maps(values)
    np.testing.assert_array_equal(maps[1], [[8, 9, 10], [11, 12, 13]])


def test_finding_a_grid_draws_no_global_random_numbers(loaded):
    torch.manual_seed(0)
    expected = torch.rand(1)
    torch.manual_seed(0)
    find_token_grid(loaded.model)
    assert torch.rand(1) == expected
