"""BiomedCLIP's own: published sizes, files and configs. Its towers: open_clip/test_towers.py."""

import shutil

import open_clip
import pytest
import torch
from safetensors.torch import save_file
from transformers import BertConfig

from moellava.encoders import BiomedClipEncoder
from moellava.testing import (
    BIOMEDBERT,
    BIOMEDCLIP,
    REVISION,
    fill_hub_cache,
)
from tests.encoders.conftest import open_clip_model
from tests.encoders.oracles import encode_image, hooked, random_pixels


@pytest.mark.real_size
@pytest.mark.slow
def test_real_size_biomedclip_pickle_gives_timms_tokens(tmp_path):
    (repo,) = fill_hub_cache(tmp_path, [BIOMEDCLIP], full_text=True).values()
    pickled = torch.load(repo / "open_clip_pytorch_model.bin", weights_only=True, mmap=True)
    weights = [value for value in pickled.values() if value.is_floating_point()]
    assert sum(value.numel() for value in weights) == 195_902_721  # the published file's
    encoder = BiomedClipEncoder.from_pretrained(BIOMEDCLIP, cache_dir=tmp_path)
    assert (encoder.num_patches, encoder.hidden_size, encoder.grid) == (196, 768, (14, 14))
    assert sum(p.numel() for p in encoder.parameters()) == 85_798_656 + 393_216
    assert (encoder.config.tower, encoder.config.revision) == (BIOMEDCLIP, REVISION)
    # open_clip itself builds the text tower too: show it a BERT of that size.
    config = repo / "open_clip_config.json"
    BertConfig().save_pretrained(tmp_path / "bert")
    config.write_text(
        config.read_text().replace(
            f'"hf_model_name": "{BIOMEDBERT}"', f'"hf_model_name": "{tmp_path}/bert"'
        )
    )
    model = open_clip_model(repo)
    pixels = random_pixels(encoder)
    assert torch.equal(encoder(pixels).patch_tokens, hooked(model, pixels, 10)[:, 1:])
    assert torch.equal(encoder(pixels, output_pooled=True).pooled, encode_image(model, pixels))


def test_misspelt_setting_suggests_the_right_one(architecture):
    with pytest.raises(TypeError, match=r"no option 'select_layr'\. Did you mean 'select_layer'\?"):
        BiomedClipEncoder.from_pretrained(architecture("vit"), select_layr=-1)


def test_text_tower_is_neither_built_nor_asked_for(
    hub_cache, small_biomedclip, no_network, monkeypatch
):
    monkeypatch.setattr(open_clip.model, "HFTextEncoder", None)
    encoder = BiomedClipEncoder.from_pretrained(small_biomedclip)
    assert not [name for name, _ in encoder.named_parameters() if "text" in name]


def test_safetensors_and_pickles_give_the_same_tower(architecture, tmp_path):
    repo = architecture("biomedclip")
    shutil.copy(repo / "open_clip_config.json", tmp_path)
    state = torch.load(repo / "open_clip_pytorch_model.bin", weights_only=True)
    save_file(state, tmp_path / "open_clip_model.safetensors")
    a, b = BiomedClipEncoder.from_pretrained(repo), BiomedClipEncoder.from_pretrained(tmp_path)
    for (name, one), (_, two) in zip(a.state_dict().items(), b.state_dict().items(), strict=True):
        assert torch.equal(one, two), name
