"""Causal maps and gradients against captum on the same masks, and by hand."""

import numpy as np
import pytest
import torch
from captum.attr import FeatureAblation, InputXGradient

from moellava.explain.effects import (
    AnswerScorer,
    ablation_map,
    gradient_map,
    mean_colour,
    mix_blocks,
)

BLOCKS = (2, 3)


@pytest.fixture(scope="module")
def scorer(loaded, picture):
    prompt = loaded.processor(text=["<image>\nWhat is this?"], images=[picture])
    num_prompt = len(prompt["input_ids"][0])
    ids = torch.tensor([[*prompt["input_ids"][0], 301, 302, 303]])
    return AnswerScorer(loaded.model, ids, num_prompt)


@pytest.fixture(scope="module")
def pixels(loaded, picture):
    return loaded.processor.image_processor([picture], return_tensors="pt")["pixel_values"]


def pixel_mask(height, width, blocks):
    """The number of the block that each pixel belongs to, (1, 1, H, W)."""
    rows = torch.arange(height) * blocks[0] // height
    columns = torch.arange(width) * blocks[1] // width
    return (rows[:, None] * blocks[1] + columns[None, :])[None, None]


def test_ablation_equals_captum_on_masks_of_pixels(scorer, pixels):
    found = ablation_map(scorer, pixels, BLOCKS, batch_size=4)
    mask = pixel_mask(*pixels.shape[-2:], BLOCKS)
    expected = FeatureAblation(lambda variants: scorer(variants[:, None])).attribute(
        pixels, baselines=mean_colour(pixels), feature_mask=mask
    )  # (A, 3, H, W)
    for row, column in np.ndindex(BLOCKS):
        inside = (mask[0, 0] == row * BLOCKS[1] + column).nonzero()[0]
        np.testing.assert_allclose(
            found[:, 0, row, column], expected[:, 0, inside[0], inside[1]], rtol=1e-3, atol=1e-5
        )


@torch.no_grad()
def test_ablation_is_the_loss_of_log_probability(scorer, pixels):
    found = ablation_map(scorer, pixels, BLOCKS)
    blanked = pixels.clone()
    height, width = pixels.shape[-2:]
    colour = pixels.mean((-2, -1))
    blanked[0, :, : height // 2, -(width // 3) :] = colour[0, :, None, None]
    lost = scorer(pixels[None]) - scorer(blanked[None])
    np.testing.assert_allclose(found[:, 0, 0, 2], lost[0].numpy(), rtol=2e-2, atol=1e-5)
    assert np.abs(found).max() > 1e-4  # there is something to compare


@torch.no_grad()
def test_without_all_blocks_the_image_is_blank(scorer, pixels):
    found = ablation_map(scorer, pixels, (1, 1))
    lost = scorer(pixels[None]) - scorer(mean_colour(pixels)[None])
    np.testing.assert_allclose(found[:, 0, 0, 0], lost[0].numpy(), rtol=1e-3, atol=1e-5)


def test_gradient_equals_captums_input_x_gradient(scorer, pixels):
    found = gradient_map(scorer, pixels, BLOCKS)
    centred = (pixels - mean_colour(pixels)).requires_grad_(True)
    colour = mean_colour(pixels)
    product = InputXGradient(lambda values: scorer((values + colour)[:, None]).sum(-1))
    expected = product.attribute(centred)[0].sum(0)  # (H, W)
    mask = pixel_mask(*pixels.shape[-2:], BLOCKS)[0, 0]
    sums = [float(expected[mask == block].sum().detach()) for block in range(BLOCKS[0] * BLOCKS[1])]
    np.testing.assert_allclose(found.ravel(), sums, rtol=1e-3, atol=1e-6)


def test_a_gradient_leaves_none_behind(loaded, scorer, pixels):
    gradient_map(scorer, pixels, BLOCKS)
    assert all(weight.grad is None for weight in loaded.model.parameters())


def test_each_image_has_blocks_of_its_own():
    pixels = torch.stack([torch.zeros(3, 4, 4), torch.ones(3, 4, 4)])
    pixels[:, :, 0, 0] += 16
    keep = torch.ones(1, 2, 2, 2)
    keep[0, 1, 0, 0] = 0
    mixed = mix_blocks(pixels, keep)[0]
    torch.testing.assert_close(mixed[0], pixels[0])
    torch.testing.assert_close(mixed[1, :, :2, :2], torch.full((3, 2, 2), 2.0))
    torch.testing.assert_close(mixed[1, :, 2:], pixels[1, :, 2:])
