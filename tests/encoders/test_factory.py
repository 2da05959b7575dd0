"""Detection, creation, and a third-party encoder in one file."""

import logging
import re
import shutil
from importlib.metadata import EntryPoint
from pathlib import Path

import pytest
import torch
from transformers import AutoConfig, AutoModel

from moellava import plugins
from moellava.encoders import (
    BiomedClipEncoder,
    ClipEncoder,
    create_encoder,
    detect_encoder_type,
    encoder_options,
    factory,
    register_encoder,
)
from moellava.testing import BIOMEDCLIP, OPENAI_CLIP, in_fresh_memory

EXAMPLE = Path(__file__).parents[2] / "docs" / "add_an_encoder.md"


@pytest.fixture
def registry(monkeypatch):
    """A copy of the table, so that a test's encoder is gone afterwards."""
    monkeypatch.setattr(factory, "ENCODERS", list(factory.ENCODERS))


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("microsoft/BiomedCLIP-PubMedBERT_256-vit_base_patch16_224", "biomedclip"),
        ("hf-hub:someone/my-BIOMEDCLIP-siglip", "biomedclip"),
        ("someone/MedCLIP-vit", "biomedclip"),
        ("google/siglip-base-patch16-224", "siglip"),
        ("google/SigLIP2-clip-like", "siglip"),
        ("google/siglip2-base-patch16-224", "siglip"),
        ("google/siglip2-base-patch16-naflex", "siglip2"),
        ("openai/clip-vit-large-patch14-336", "clip"),
        ("facebook/dinov2-base", "dinov2"),
    ],
)
def test_names_are_told_apart_longest_word_first(name, expected, no_network):
    assert detect_encoder_type(name) == expected


def test_files_of_a_folder_say_more_than_its_name(hub_cache, tmp_path, no_network):
    misnamed = tmp_path / "biomedclip_no_it_is_not"
    shutil.copytree(hub_cache[OPENAI_CLIP], misnamed)
    assert detect_encoder_type(misnamed) == "clip"
    assert type(create_encoder("auto", misnamed)) is ClipEncoder
    assert detect_encoder_type(hub_cache[BIOMEDCLIP]) == "biomedclip"
    assert (
        detect_encoder_type(hub_cache[BIOMEDCLIP] / "open_clip_pytorch_model.bin") == "biomedclip"
    )


def test_unknown_source_lists_the_known_families(tmp_path):
    for name in ("someone/mystery", tmp_path):
        with pytest.raises(
            ValueError, match=r"Cannot tell.*one of biomedclip, siglip2, siglip, clip, dinov2"
        ):
            detect_encoder_type(name)


def test_unknown_type_suggests_the_nearest(small_biomedclip):
    with pytest.raises(
        ValueError, match=r"'biomedclp'\. Did you mean 'biomedclip'\? Known: biomedclip, clip"
    ):
        create_encoder("biomedclp", small_biomedclip)
    with pytest.raises(ValueError, match="Which tower"):
        create_encoder("clip")


def test_options_reach_the_encoder(small_biomedclip):
    encoder = create_encoder(
        "biomedclip",
        small_biomedclip,
        image_size=112,
        select_layer=[-1, -3],
        select_feature="cls_patch",
        final_norm=True,
        dtype=torch.bfloat16,
        device="cpu",
    )
    config = encoder.config
    assert (config.image_size, config.select_layer, config.select_feature) == (
        112,
        [-1, -3],
        "cls_patch",
    )
    assert (encoder.num_patches, encoder.hidden_size, encoder.dtype) == (50, 384, torch.bfloat16)
    assert not encoder.training


def test_biomedclip_options_are_refused_for_other_towers(hub_cache):
    for option in ("load_text", "fallback_to_default"):
        with pytest.raises(ValueError, match=rf"{option} is for encoder_type='biomedclip'"):
            create_encoder("clip", OPENAI_CLIP, **{option: True})


def test_unknown_and_foreign_options_are_refused_with_the_known_ones(hub_cache):
    with pytest.raises(TypeError, match=r"no option 'select_layr'\. Did you mean 'select_layer'\?"):
        create_encoder("clip", OPENAI_CLIP, select_layr=-1)
    # A field of the config that says what was loaded is not for a user to choose.
    with pytest.raises(TypeError, match=r"no option 'tower'.*Known: image_size, patch_tokens"):
        create_encoder("clip", OPENAI_CLIP, tower="mine")


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("select_layer", "x", r"select_layer is 'x'; expected int \| list"),
        ("image_size", True, "image_size is True; expected int"),
        ("image_size", -16, "image_size is -16; give a positive side"),
        ("final_norm", "yes", "final_norm is 'yes'; expected bool"),
        ("select_feature", 3, "select_feature is 3; expected str"),
    ],
)
def test_options_of_the_wrong_type_are_named(hub_cache, name, value, message):
    with pytest.raises(ValueError, match=message):
        create_encoder("clip", OPENAI_CLIP, **{name: value})


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"device": "banana"}, r"device is 'banana', but this machine has cpu.*: "),
        ({"device": "xpu:7"}, r"device is 'xpu:7', but this machine has cpu.*: "),
        ({"dtype": "int8"}, "dtype is 'int8'; give torch.float32"),
        ({"dtype": "banana"}, "dtype is 'banana'; give torch.float32"),
    ],
)
def test_devices_and_dtypes_that_cannot_be_are_named(hub_cache, options, message):
    with pytest.raises(ValueError, match=message):
        create_encoder("clip", OPENAI_CLIP, **options)


def test_none_keeps_the_towers_own(small_biomedclip):
    given = dict.fromkeys(encoder_options())
    assert create_encoder("biomedclip", small_biomedclip, **given).config.select_layer == -2


def test_path_unlike_biomedclip_is_warned_about_and_tried(architecture, tmp_path, caplog):
    folder = tmp_path / "plain_name"
    shutil.copytree(architecture("vit"), folder)
    with caplog.at_level(logging.WARNING, logger="moellava"):
        create_encoder(
            "biomedclip", folder
        )  # it has an open_clip_config.json: no reason to doubt it
        assert caplog.text == ""
        with pytest.raises(OSError, match="cannot get open_clip_config"):
            create_encoder("biomedclip", "someone/plain-name")
    assert "someone/plain-name does not look like a biomedclip checkpoint" in caplog.text


def test_fallback_is_loud_recorded_and_only_when_allowed(hub_cache, tmp_path, caplog, no_network):
    missing = tmp_path / "biomedclip_gone"
    with pytest.raises(FileNotFoundError, match="biomedclip_gone does not exist"):
        create_encoder("biomedclip", missing)
    with caplog.at_level(logging.WARNING, logger="moellava"):
        encoder = create_encoder("biomedclip", missing, fallback_to_default=True)
    assert re.search(
        r"biomedclip_gone cannot be loaded .* Loading microsoft/BiomedCLIP\S+ INSTEAD", caplog.text
    )
    assert encoder.config.tower == BIOMEDCLIP


# ---- third-party encoders ----


def example_code() -> str:
    """The Python block of the guide that defines an encoder which only pools."""
    blocks = re.findall(r"```python\n(.*?)```", EXAMPLE.read_text(), flags=re.DOTALL)
    return next(block for block in blocks if "PooledResNet" in block)


def test_documented_custom_encoder_gets_synthesized_tokens(registry, tmp_path, caplog):
    scope: dict = {}
    with caplog.at_level(logging.WARNING, logger="moellava"):
        exec(compile(example_code(), str(EXAMPLE), "exec"), scope)
        torch.manual_seed(0)
        encoder = scope["PooledResNetEncoder"](scope["PooledResNetConfig"](image_size=64)).eval()
    assert "no spatial detail" in " ".join(caplog.text.split())
    pixels = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        output = encoder(pixels)
        assert output.synthesized is True
        assert (encoder.hidden_size, encoder.num_patches, encoder.grid) == (2048, 49, (7, 7))
        assert torch.equal(output.patch_tokens, output.pooled[:, None].expand(2, 49, 2048))
        encoder.save_pretrained(tmp_path / "my-resnet50")
        for again in (
            create_encoder("auto", tmp_path / "my-resnet50"),
            AutoModel.from_pretrained(tmp_path / "my-resnet50"),
        ):
            assert type(again) is scope["PooledResNetEncoder"]
            found = in_fresh_memory(again)(pixels).patch_tokens
            assert torch.equal(found, output.patch_tokens)
    assert encoder.encode(torch.rand(3, 90, 80)).shape == (1, 49, 2048)
    with pytest.raises(
        ValueError, match=r"'real', but PooledResNetEncoder .* only gives one pooled vector"
    ):
        scope["PooledResNetEncoder"](scope["PooledResNetConfig"](patch_tokens="real"))


def test_entry_point_registers_an_encoder(registry, monkeypatch):
    calls = []

    class Entry(EntryPoint):
        def load(self):
            return lambda: calls.append(self.name)

    def entry_points(group):
        assert group == "moellava.encoders"
        return [Entry("mine", "package:register", group)]

    monkeypatch.setattr(plugins, "entry_points", entry_points)
    plugins.load_plugins.cache_clear()
    factory.encoder_kinds()
    factory.encoder_kinds()
    plugins.load_plugins.cache_clear()
    assert calls == ["mine"]


def test_taken_names_and_mismatched_classes_are_refused(registry):
    with pytest.raises(ValueError, match="'clip' is taken by clip:ClipEncoder"):
        register_encoder("clip", BiomedClipEncoder.config_class, BiomedClipEncoder)
    with pytest.raises(
        ValueError,
        match=r"ClipEncoder\.config_class is ClipVisionConfig, but BiomedClipVisionConfig",
    ):
        register_encoder("mine", BiomedClipEncoder.config_class, ClipEncoder)


def test_detect_of_a_registered_encoder_is_asked_first(registry):
    register_encoder(
        "mine", ClipEncoder.config_class, ClipEncoder, detect=lambda path: "biomedclip-mine" in path
    )
    assert detect_encoder_type("someone/biomedclip-mine") == "mine"
    assert detect_encoder_type("someone/biomedclip") == "biomedclip"


@pytest.mark.parametrize("kind", factory.ENCODERS, ids=lambda kind: kind.name)
def test_every_family_registers_with_the_auto_classes(kind):
    encoder_class = kind.encoder_class()
    config = AutoConfig.for_model(encoder_class.config_class.model_type)
    assert type(config) is encoder_class.config_class
    with torch.device("meta"):
        encoder = AutoModel.from_config(config)
    assert type(encoder) is encoder_class
    assert encoder.num_patches == encoder.grid[0] * encoder.grid[1] == config.num_patches
    assert config.hidden_size == encoder.hidden_size
    assert encoder_class._can_set_experts_implementation()
