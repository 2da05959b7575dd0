"""The contract of every encoder, on towers of open_clip."""

import pytest
import torch
from transformers import AutoConfig, AutoModel, PreTrainedModel
from transformers.configuration_utils import PreTrainedConfig, SubConfigSpec

from moellava.encoders import BiomedClipEncoder
from moellava.testing import (
    in_fresh_memory,
)
from tests.encoders.conftest import open_clip_model
from tests.encoders.oracles import hooked, random_pixels


def test_select_feature_names_what_llava_means(architecture):
    repo = architecture("biomedclip")
    model = open_clip_model(repo)
    encoder = BiomedClipEncoder.from_pretrained(repo)
    pixels = random_pixels(encoder)
    hidden = hooked(model, pixels, -2)  # (B, 1 + 196, D)
    expected = {"patch": hidden[:, 1:], "cls_patch": hidden, "cls": hidden[:, :1]}
    expected |= {"default": expected["patch"], "full": expected["cls_patch"]}
    for feature, tokens in expected.items():
        encoder = BiomedClipEncoder.from_pretrained(repo, select_feature=feature)
        assert torch.equal(encoder(pixels).patch_tokens, tokens)
        assert encoder.num_patches == encoder.config.num_patches == tokens.shape[1]
        assert encoder.grid == (14, 14)


def test_list_of_layers_concatenates_along_the_width(architecture):
    repo = architecture("vit")
    encoder = BiomedClipEncoder.from_pretrained(
        repo, select_layer=[-1, 1, -2], select_feature="cls_patch"
    )
    pixels = random_pixels(encoder)
    model = open_clip_model(repo)
    expected = torch.cat([hooked(model, pixels, index) for index in (-1, 0, -2)], dim=-1)
    assert torch.equal(encoder(pixels).patch_tokens, expected)
    assert encoder.hidden_size == 3 * 64


def test_final_norm_is_the_trunks_own(architecture):
    for name, norm in (("biomedclip", "trunk.norm"), ("vit", "ln_post")):
        repo = architecture(name)
        encoder = BiomedClipEncoder.from_pretrained(repo, final_norm=True)
        pixels, model = random_pixels(encoder), open_clip_model(repo)
        expected = model.visual.get_submodule(norm)(hooked(model, pixels, -2))[:, 1:]
        assert torch.equal(encoder(pixels).patch_tokens, expected)
    with pytest.raises(ValueError, match=r"final_norm is True.*no norm that fits"):
        BiomedClipEncoder.from_pretrained(architecture("timm_resnet"), final_norm=True)


@pytest.mark.parametrize("layer", [0, -13, 13, 99])
def test_layer_out_of_range_lists_the_range(architecture, layer):
    with pytest.raises(
        ValueError, match=rf"select_layer is {layer}, but the trunk has 12 layers: use -12 to -1"
    ):
        BiomedClipEncoder.from_pretrained(architecture("biomedclip"), select_layer=layer)


def test_layers_of_different_grids_do_not_join(architecture):
    with pytest.raises(
        ValueError, match=r"joins layers of different grids \[\(5, 5\), \(10, 10\)\]"
    ):
        BiomedClipEncoder.from_pretrained(architecture("timm_convnext"), select_layer=[-1, -2])


def test_trained_size_is_unchanged_bit_for_bit(repo):
    plain = BiomedClipEncoder.from_pretrained(repo)
    named = BiomedClipEncoder.from_pretrained(repo, image_size=plain.config.image_hw)
    pixels = random_pixels(plain)
    assert torch.equal(plain(pixels).patch_tokens, named(pixels).patch_tokens)


def test_336_pixels_give_441_patches(architecture):
    encoder = BiomedClipEncoder.from_pretrained(architecture("biomedclip"), image_size=336)
    assert (encoder.grid, encoder.num_patches, encoder.image_size) == ((21, 21), 441, 336)


def test_size_that_the_patches_do_not_divide_is_refused(architecture):
    with pytest.raises(ValueError, match=r"225x225 pixels.*patches of 16x16.*224x224"):
        BiomedClipEncoder.from_pretrained(architecture("biomedclip"), image_size=225)


def test_wrong_pixel_shape_names_both_shapes(architecture):
    encoder = BiomedClipEncoder.from_pretrained(architecture("vit"))
    with pytest.raises(ValueError, match=r"\(1, 3, 32, 64\); expected \(images, 3, 64, 64\)"):
        encoder(torch.zeros(1, 3, 32, 64))


def test_saved_encoder_reloads_bit_for_bit(repo, tmp_path):
    encoder = BiomedClipEncoder.from_pretrained(repo, select_layer=-1)
    encoder.save_pretrained(tmp_path)
    again = AutoModel.from_pretrained(tmp_path)
    assert type(again) is BiomedClipEncoder
    assert not again.training
    pixels = random_pixels(encoder)
    with torch.no_grad():
        for a, b in zip(
            encoder(pixels, True).to_tuple(), again(pixels, True).to_tuple(), strict=True
        ):
            assert a is b if isinstance(a, bool) else torch.equal(a, b)
    assert again.config.to_dict() == encoder.config.to_dict() | {"dtype": "float32"} | {
        k: v
        for k, v in again.config.to_dict().items()
        if k in ("_name_or_path", "architectures", "dtype")
    }


@pytest.mark.parametrize("name", ["biomedclip", "vit", "timm_swin", "modified_resnet"])
def test_saved_encoder_of_another_size_reloads_bit_for_bit(architecture, name, tmp_path):
    size = 448 if name == "timm_swin" else 128
    encoder = BiomedClipEncoder.from_pretrained(architecture(name), image_size=size)
    encoder.save_pretrained(tmp_path)
    again = BiomedClipEncoder.from_pretrained(tmp_path)
    pixels = random_pixels(encoder)
    assert pixels.shape[-1] == size
    expected = in_fresh_memory(encoder)(pixels).patch_tokens
    assert torch.equal(in_fresh_memory(again)(pixels).patch_tokens, expected)
    resized = BiomedClipEncoder.from_pretrained(tmp_path, image_size=2 * size)
    assert resized.num_patches == 4 * encoder.num_patches


def test_incomplete_saved_encoder_is_refused_with_the_missing_names(architecture, tmp_path):
    encoder = BiomedClipEncoder.from_pretrained(architecture("biomedclip"))
    state = encoder.state_dict()
    del state["visual.trunk.cls_token"]
    encoder.save_pretrained(tmp_path, state_dict=state)
    with pytest.raises(
        ValueError, match=r"do not fit its configuration\. missing keys: visual\.trunk\.cls_token"
    ):
        BiomedClipEncoder.from_pretrained(tmp_path)


class ParentConfig(PreTrainedConfig):
    model_type = "encoder_test_parent"
    sub_configs_defaults = {
        "vision_config": SubConfigSpec(config_class=AutoConfig, model_type="biomedclip_vision")
    }
    vision_config: dict | PreTrainedConfig | None = None


class Parent(PreTrainedModel):
    config_class = ParentConfig

    def __init__(self, config):
        super().__init__(config)
        self.vision_tower = AutoModel.from_config(config.vision_config)
        self.post_init()


def test_nested_in_a_parent_it_reloads_bit_for_bit(repo, tmp_path):
    encoder = BiomedClipEncoder.from_pretrained(repo)
    parent = Parent(ParentConfig(vision_config=encoder.config.to_dict())).eval()
    parent.vision_tower.load_state_dict(encoder.state_dict())
    parent.save_pretrained(tmp_path)
    again = Parent.from_pretrained(tmp_path, experts_implementation="eager").eval()
    pixels = random_pixels(encoder)
    expected = in_fresh_memory(encoder)(pixels).patch_tokens
    assert torch.equal(in_fresh_memory(again.vision_tower)(pixels).patch_tokens, expected)
    assert again.config.vision_config.num_patches == encoder.num_patches


def test_gradient_reaches_the_pixels_and_frozen_weights_stay_frozen(repo):
    encoder = BiomedClipEncoder.from_pretrained(repo).requires_grad_(False)
    pixels = random_pixels(encoder).requires_grad_()
    encoder(pixels).patch_tokens.square().sum().backward()
    assert pixels.grad.abs().sum() > 0
    assert all(p.grad is None and not p.requires_grad for p in encoder.parameters())


@pytest.mark.slow
@pytest.mark.parametrize("name", ["biomedclip", "vit", "timm_convnext", "modified_resnet"])
def test_compiled_without_graph_breaks_gives_the_same_tokens(architecture, name):
    encoder = BiomedClipEncoder.from_pretrained(architecture(name)).requires_grad_(False)
    pixels = random_pixels(encoder)
    torch._dynamo.reset()
    # Not inductor, which compiles C++ for half a minute and makes no other graph.
    compiled = torch.compile(encoder, fullgraph=True, backend="aot_eager")
    assert torch.allclose(compiled(pixels).patch_tokens, encoder(pixels).patch_tokens, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["biomedclip", "vit", "timm_convnext"])
def test_exported_program_gives_the_same_tokens(architecture, name):
    encoder = BiomedClipEncoder.from_pretrained(architecture(name)).requires_grad_(False)
    pixels = random_pixels(encoder)
    exported = torch.export.export(encoder, (pixels,))
    tokens = exported.module()(pixels)["patch_tokens"]
    assert torch.allclose(tokens, encoder(pixels).patch_tokens, atol=1e-5)
