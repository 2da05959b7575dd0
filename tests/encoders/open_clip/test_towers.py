"""Towers of open_clip and timm, against their own forward on the same weights."""

import sys

import pytest
import timm
import torch

from moellava.encoders import BiomedClipEncoder, BiomedClipVisionConfig
from moellava.testing import (
    write_biomedclip,
)
from tests.encoders.architectures import timm_trunk
from tests.encoders.conftest import open_clip_model
from tests.encoders.oracles import blocks_of, encode_image, flat, hooked, random_pixels


def test_patch_tokens_equal_a_hook_in_open_clips_own_forward(repo):
    name = repo.name.removeprefix("open_clip_")
    encoder, model = BiomedClipEncoder.from_pretrained(repo), open_clip_model(repo)
    pixels = random_pixels(encoder)
    output = encoder(pixels)
    expected = flat(name, hooked(model, pixels, -2), encoder.num_patches)
    assert torch.equal(output.patch_tokens, expected)
    assert output.patch_tokens.shape == (2, encoder.num_patches, encoder.hidden_size)
    assert encoder.grid[0] * encoder.grid[1] == encoder.num_patches
    assert output.synthesized is False
    assert output.pooled is None
    other = flat(name, hooked(model, pixels, -1), encoder.num_patches)  # the oracle can say no
    assert other.shape != expected.shape or not torch.allclose(other, expected)


def test_pooled_equals_encode_image(repo):
    encoder, model = BiomedClipEncoder.from_pretrained(repo), open_clip_model(repo)
    pixels = random_pixels(encoder)
    output = encoder(pixels, output_pooled=True)
    assert torch.equal(output.pooled, encode_image(model, pixels))
    assert torch.equal(output.patch_tokens, encoder(pixels).patch_tokens)


def test_tokens_of_one_image_differ_between_patches(repo):
    encoder = BiomedClipEncoder.from_pretrained(repo)
    tokens = encoder(random_pixels(encoder)).patch_tokens
    assert (tokens[:, 0] - tokens[:, 1]).abs().max() > 1e-3


def test_bfloat16_tower_equals_open_clips_bfloat16(repo):
    encoder = BiomedClipEncoder.from_pretrained(repo, dtype=torch.bfloat16)
    model = open_clip_model(repo).to(torch.bfloat16)
    pixels = random_pixels(encoder).to(torch.bfloat16)
    assert {p.dtype for p in encoder.parameters()} == {torch.bfloat16}
    output = encoder(pixels, output_pooled=True)
    assert torch.equal(output.pooled, encode_image(model, pixels))
    expected = flat(
        repo.name.removeprefix("open_clip_"), hooked(model, pixels, -2), encoder.num_patches
    )
    assert torch.equal(output.patch_tokens, expected)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_cuda_tower_equals_open_clips(repo, dtype):
    encoder = BiomedClipEncoder.from_pretrained(repo, device="cuda", dtype=dtype)
    model = open_clip_model(repo).to("cuda", dtype)
    pixels = random_pixels(encoder).to("cuda", dtype)
    with torch.no_grad():
        torch.testing.assert_close(
            encoder(pixels, output_pooled=True).pooled, encode_image(model, pixels)
        )


def test_tokens_equal_timms_forward_intermediates_for_every_layer(architecture):
    repo = architecture("biomedclip")
    trunk = timm.create_model("vit_tiny_patch16_224", num_classes=0).eval()
    state = torch.load(repo / "open_clip_pytorch_model.bin", weights_only=True)
    prefix = "visual.trunk."
    trunk.load_state_dict(
        {k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix)}
    )
    encoder = BiomedClipEncoder.from_pretrained(repo)
    pixels = random_pixels(encoder)
    with torch.no_grad():
        expected = trunk.forward_intermediates(
            pixels, norm=False, output_fmt="NLC", intermediates_only=True
        )
        for index in range(12):
            for layer in (
                index - 12,
                index + 1,
            ):  # LLaVA counts hidden states from the embeddings on
                encoder.config.select_layer = layer
                assert torch.equal(encoder(pixels).patch_tokens, expected[index])


@pytest.mark.real_size
@pytest.mark.slow
def test_real_size_vit_large_gives_timms_tokens(tmp_path):
    name, prefix = "vit_large_patch14_224", "visual.trunk."
    repo = write_biomedclip(
        tmp_path / "biomedclip_large", vision=name, image_size=224, embed_dim=768
    )
    state = torch.load(repo / "open_clip_pytorch_model.bin", weights_only=True, mmap=True)
    with torch.device("meta"):
        trunk = timm.create_model(name, num_classes=0).eval()
    weights = {
        key.removeprefix(prefix): value for key, value in state.items() if key.startswith(prefix)
    }
    trunk.load_state_dict(weights, assign=True)
    for image_size, num_patches in (
        (224, 256),
        (336, 576),
    ):  # timm's trunk follows from one to the other
        encoder = BiomedClipEncoder.from_pretrained(repo, image_size=image_size)
        assert (encoder.num_patches, encoder.hidden_size) == (num_patches, 1024)
        trunk.set_input_size(image_size)
        pixels = random_pixels(encoder)[:1]
        with torch.no_grad():
            (expected,) = trunk.forward_intermediates(
                pixels,
                indices=[22],
                norm=False,
                output_fmt="NLC",
                intermediates_only=True,
                stop_early=True,
            )
            assert torch.equal(encoder(pixels).patch_tokens, expected)


def test_blocks_after_the_selected_one_do_not_run(repo):
    encoder = BiomedClipEncoder.from_pretrained(repo)
    ran = []
    for index, block in enumerate(blocks_of(encoder.visual)):
        block.register_forward_hook(lambda module, args, output, index=index: ran.append(index))
    encoder(random_pixels(encoder))
    assert ran == list(range(encoder.num_layers - 1))


def test_registers_are_no_patches_and_no_class_token(architecture):
    repo = architecture("timm_register_no_class")
    encoder = BiomedClipEncoder.from_pretrained(repo, select_feature="full")
    assert encoder.num_patches == 100
    for feature in ("cls", "cls_patch"):
        with pytest.raises(ValueError, match=f"{feature!r}, but this trunk has no class token"):
            BiomedClipEncoder.from_pretrained(repo, select_feature=feature)


def test_class_token_is_told_from_registers():
    vision_cfg = timm_trunk("vit_small_patch14_reg4_dinov2", timm_pool="", image_size=518)
    config = BiomedClipVisionConfig(
        vision_cfg=vision_cfg, image_size=56, select_feature="cls_patch"
    )
    encoder = BiomedClipEncoder(config).eval()
    assert encoder.num_patches == 1 + 16
    seen = []
    hook = encoder.visual.trunk.blocks[-2].register_forward_hook(
        lambda *call: seen.append(call[-1])
    )
    tokens = encoder(random_pixels(encoder, 1)).patch_tokens
    hook.remove()
    assert torch.equal(tokens, torch.cat([seen[0][:, :1], seen[0][:, 5:]], dim=1))


@pytest.mark.parametrize(
    ("name", "size"),
    [
        ("biomedclip", 336),
        ("biomedclip", (160, 320)),
        ("timm_eva", 280),
        ("timm_swin", 448),
        ("timm_convnext", (224, 160)),
        ("timm_resnet", 96),
        ("timm_pre_norm", 128),
        ("vit", 96),
        ("vit", (64, 128)),
        ("vit_coca", 128),
    ],
)
def test_other_image_size_equals_open_clips_force_image_size(architecture, name, size):
    repo = architecture(name)
    encoder = BiomedClipEncoder.from_pretrained(repo, image_size=size)
    model = open_clip_model(repo, force_image_size=size)
    pixels = random_pixels(encoder)
    assert pixels.shape[2:] == ((size, size) if isinstance(size, int) else size)
    output = encoder(pixels, output_pooled=True)
    assert torch.equal(output.pooled, encode_image(model, pixels))
    assert output.patch_tokens.shape[1] == encoder.num_patches == encoder.grid[0] * encoder.grid[1]
    crop = encoder.image_processor.crop_size
    assert (crop["height"], crop["width"]) == encoder.config.image_hw


def test_modified_resnet_takes_another_square_and_no_rectangle(architecture):
    repo = architecture("modified_resnet")
    encoder = BiomedClipEncoder.from_pretrained(repo, image_size=128)
    output = encoder(random_pixels(encoder), output_pooled=True)
    assert (encoder.grid, output.pooled.shape) == ((8, 8), (2, 32))
    with pytest.raises(ValueError, match="attention pool only takes squares"):
        BiomedClipEncoder.from_pretrained(repo, image_size=(64, 96))


@pytest.mark.parametrize("name", ["biomedclip", "vit", "timm_convnext"])
def test_activation_checkpointing_gives_the_same_gradients(architecture, name):
    gradients = []
    for checkpointing in (False, True):
        encoder = BiomedClipEncoder.from_pretrained(architecture(name)).train()
        if checkpointing:
            encoder.activation_checkpointing_enable()
        pixels = random_pixels(encoder).requires_grad_()
        encoder(pixels).patch_tokens.square().mean().backward()
        gradients.append(pixels.grad)
    assert torch.allclose(*gradients, atol=1e-7)


def test_activation_checkpointing_of_a_modified_resnet_is_refused(architecture):
    encoder = BiomedClipEncoder.from_pretrained(architecture("modified_resnet"))
    with pytest.raises(ValueError, match="ModifiedResNet has no activation checkpointing"):
        encoder.activation_checkpointing_enable()


def test_without_open_clip_the_error_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "open_clip.model", None)
    with pytest.raises(ImportError, match="pip install open_clip_torch"):
        BiomedClipEncoder(BiomedClipVisionConfig())


def test_unknown_timm_model_is_named():
    with pytest.raises(
        ValueError, match=r"open_clip cannot build the image tower.*vit_huge_from_nowhere"
    ):
        BiomedClipEncoder(
            BiomedClipVisionConfig(vision_cfg={"timm_model_name": "vit_huge_from_nowhere"})
        )
