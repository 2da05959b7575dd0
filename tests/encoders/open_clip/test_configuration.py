"""The config of an open_clip tower."""

import pytest
import torch
from transformers import AutoConfig

from moellava.encoders import (
    BiomedClipEncoder,
    BiomedClipVisionConfig,
)


def test_config_is_plain_json_and_round_trips(repo):
    config = BiomedClipEncoder.from_pretrained(repo).config
    again = AutoConfig.for_model(**config.to_dict())
    assert type(again) is BiomedClipVisionConfig
    assert again.to_json_string() == config.to_json_string()
    assert str(repo.parent) not in config.to_json_string()
    assert config.tower == repo.name


def test_default_config_is_biomedclip_and_builds_on_meta():
    with torch.device("meta"):
        encoder = BiomedClipEncoder(BiomedClipVisionConfig())
    assert (encoder.num_patches, encoder.hidden_size, encoder.grid) == (196, 768, (14, 14))
    assert encoder.config.num_patches == 196


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        (
            "select_feature",
            "patches",
            "select_feature is 'patches'; choose one of 'patch', 'default'",
        ),
        (
            "patch_tokens",
            "fake",
            "patch_tokens is 'fake'; choose one of 'auto', 'real', 'synthesized'",
        ),
        ("select_layer", [], "select_layer is an empty list"),
        ("image_size", [1, 2, 3], r"image_size is \[1, 2, 3\]; give one side"),
        ("image_size", 0, "image_size is 0"),
    ],
)
def test_wrong_settings_list_the_right_ones(field, value, message):
    with pytest.raises(ValueError, match=message):
        BiomedClipVisionConfig(**{field: value})
