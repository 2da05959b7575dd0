"""Synthesized patch tokens."""

import logging

import pytest
import torch

from moellava.encoders import BiomedClipEncoder
from moellava.encoders.outputs import synthesize_patch_tokens
from tests.encoders.conftest import open_clip_model
from tests.encoders.oracles import encode_image, random_pixels


def test_forced_synthesis_repeats_encode_image_and_warns_once(architecture, caplog):
    repo = architecture("biomedclip")
    with caplog.at_level(logging.WARNING, logger="moellava"):
        encoder = BiomedClipEncoder.from_pretrained(repo, patch_tokens="synthesized")
        output = encoder(random_pixels(encoder))
        encoder(random_pixels(encoder))
    warnings = [
        r.message for r in caplog.records if "synthesized" in r.message and r.levelname == "WARNING"
    ]
    assert len(warnings) == 1
    assert "no spatial detail" in warnings[0].replace("  ", " ")
    pooled = encode_image(open_clip_model(repo), random_pixels(encoder))
    assert torch.equal(output.patch_tokens, pooled[:, None].expand(2, 196, 32))
    assert output.synthesized is True
    assert (encoder.hidden_size, encoder.num_patches, encoder.grid) == (32, 196, (14, 14))


@pytest.mark.parametrize(
    ("shape", "num_patches", "message"),
    [
        ((2, 3, 4), 196, r"pooled has shape \(2, 3, 4\); expected \(images, width\)"),
        ((2, 4), 0, "num_patches is 0; expected at least 1"),
    ],
)
def test_what_cannot_be_repeated_is_named(shape, num_patches, message):
    with pytest.raises(ValueError, match=message):
        synthesize_patch_tokens(torch.zeros(shape), num_patches)
