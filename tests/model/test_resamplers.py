"""Resamplers against transformers' own modules on the same weights."""

import torch

from moellava.model.projector import (
    build_projector,
)
from tests.model.projectors import SMALL, shape


def test_the_perceiver_is_idefics2s_but_for_its_start():
    from transformers.models.idefics2.modeling_idefics2 import Idefics2PerceiverResampler

    ours = build_projector("perceiver", shape(), SMALL["perceiver"])
    theirs = Idefics2PerceiverResampler(ours.resampler.config)
    assert (theirs.latents == 1).all()  # equal latents get equal gradients, and stay equal
    assert ours.resampler.latents.std(dim=0).min() > 0
    theirs.load_state_dict(ours.resampler.state_dict())
    tokens = torch.randn(2, 24, 12)
    expected = theirs(ours.input_projection(tokens), torch.ones(2, 24, dtype=torch.long))
    torch.testing.assert_close(ours(tokens), expected)


def test_the_qformer_is_blip2s():
    from transformers import Blip2QFormerModel

    ours = build_projector("qformer", shape(), SMALL["qformer"]).eval()
    theirs = Blip2QFormerModel(ours.qformer.config).eval()
    theirs.load_state_dict(ours.qformer.state_dict())
    tokens = torch.randn(2, 24, 12)
    expected = theirs(
        ours.query_tokens.expand(2, -1, -1), encoder_hidden_states=tokens
    ).last_hidden_state
    torch.testing.assert_close(ours(tokens), ours.output_projection(expected))
