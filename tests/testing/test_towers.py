"""Stand-ins of image towers, read by open_clip and transformers themselves."""

import torch

from moellava.testing import BIOMEDCLIP, OPENAI_CLIP


def test_open_clip_itself_reads_the_biomedclip_stand_in(hub_cache, no_network):
    import open_clip

    model, _ = open_clip.create_model_from_pretrained(f"hf-hub:{BIOMEDCLIP}")
    stored = torch.load(hub_cache[BIOMEDCLIP] / "open_clip_pytorch_model.bin", weights_only=True)
    assert len([key for key in stored if key.startswith("visual.trunk.")]) == 150
    assert torch.equal(model.visual.trunk.pos_embed, stored["visual.trunk.pos_embed"])


def test_transformers_itself_reads_the_clip_stand_in(hub_cache, no_network):
    from transformers import AutoImageProcessor, CLIPVisionModel

    assert CLIPVisionModel.from_pretrained(OPENAI_CLIP).config.hidden_size == 64
    assert AutoImageProcessor.from_pretrained(OPENAI_CLIP).crop_size["height"] == 224
