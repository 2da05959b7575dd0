"""CLIP, SigLIP, SigLIP 2 and DINOv2 encoders against transformers, on the same weights."""

import logging

import numpy as np
import pytest
import torch
import transformers
from PIL import Image
from transformers import AutoModel
from transformers.models.siglip2.image_processing_siglip2 import convert_image_to_patches

from moellava.encoders import (
    ClipEncoder,
    Dinov2Encoder,
    Siglip2Encoder,
    SiglipEncoder,
    create_encoder,
)
from moellava.testing import in_fresh_memory

SIZE = {
    "hidden_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "image_size": 64,
    "patch_size": 16,
}
WIDE = SIZE | {"intermediate_size": 96}
TEXT = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
}
TEXT |= {"vocab_size": 99, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}


def write_clip(folder):
    transformers.CLIPModel(
        transformers.CLIPConfig(vision_config=WIDE, text_config=TEXT)
    ).save_pretrained(folder)
    crop = {"height": 64, "width": 64}
    transformers.CLIPImageProcessor(size={"shortest_edge": 64}, crop_size=crop).save_pretrained(
        folder
    )


def write_siglip(folder):
    config = transformers.SiglipConfig(vision_config=WIDE, text_config=TEXT)
    transformers.SiglipModel(config).save_pretrained(folder)
    transformers.SiglipImageProcessor(size={"height": 64, "width": 64}).save_pretrained(folder)


def write_siglip2(folder):
    vision = {key: value for key, value in WIDE.items() if key != "image_size"} | {
        "num_patches": 16
    }
    transformers.Siglip2Model(
        transformers.Siglip2Config(vision_config=vision, text_config=TEXT)
    ).save_pretrained(folder)
    transformers.Siglip2ImageProcessor(patch_size=16, max_num_patches=16).save_pretrained(folder)


class Siglip2Oracle(transformers.Siglip2VisionModel):
    """transformers' tower on images, cut into patches by transformers."""

    def forward(self, pixels, interpolate_pos_encoding=True, **options):
        patches = torch.stack([convert_image_to_patches(image, 16) for image in pixels])
        shapes = torch.tensor([[side // 16 for side in pixels.shape[2:]]] * len(pixels))
        return super().forward(patches, torch.ones(patches.shape[:2]), shapes, **options)


def write_dinov2(folder, kind="Dinov2"):
    getattr(transformers, f"{kind}Model")(
        getattr(transformers, f"{kind}Config")(**SIZE)
    ).save_pretrained(folder)
    crop = {"height": 64, "width": 64}
    transformers.BitImageProcessor(size={"shortest_edge": 73}, crop_size=crop).save_pretrained(
        folder
    )


# name: (writer, encoder, the oracle's class, tokens before the patches, class token or none)
TOWERS = {
    "clip": (write_clip, ClipEncoder, transformers.CLIPVisionModel, 1, True),
    "siglip": (write_siglip, SiglipEncoder, transformers.SiglipVisionModel, 0, False),
    "siglip2": (write_siglip2, Siglip2Encoder, Siglip2Oracle, 0, False),
    "dinov2": (write_dinov2, Dinov2Encoder, transformers.Dinov2Model, 1, True),
    "dinov2_registers": (
        lambda folder: write_dinov2(folder, "Dinov2WithRegisters"),
        Dinov2Encoder,
        transformers.Dinov2WithRegistersModel,
        5,
        True,
    ),
}


@pytest.fixture(scope="module", params=sorted(TOWERS))
def tower(request, tmp_path_factory):
    """(folder, encoder class, oracle, prefix, has a class token) of a small random tower."""
    write, encoder_class, oracle_class, prefix, has_class_token = TOWERS[request.param]
    folder = tmp_path_factory.mktemp(request.param)
    torch.manual_seed(0)
    write(folder)
    return (
        folder,
        encoder_class,
        oracle_class.from_pretrained(folder).eval(),
        prefix,
        has_class_token,
    )


def pixels_of(encoder) -> torch.Tensor:
    return torch.randn(2, 3, *encoder.config.image_hw, generator=torch.Generator().manual_seed(1))


def hidden_states(oracle, pixels, **options):
    return oracle(pixels, output_hidden_states=True, **options).hidden_states


def test_patch_tokens_equal_transformers_hidden_states_for_every_layer(tower):
    folder, encoder_class, oracle, prefix, _ = tower
    for layer in (-3, -2, -1, 1, 2, 3):
        encoder = encoder_class.from_pretrained(folder, select_layer=layer)
        pixels = pixels_of(encoder)
        output = encoder(pixels)
        states = hidden_states(oracle, pixels)
        assert torch.equal(output.patch_tokens, states[layer][:, prefix:])
        assert not torch.allclose(output.patch_tokens, states[layer - 1][:, prefix:])
        assert (encoder.grid, encoder.num_patches, encoder.hidden_size) == ((4, 4), 16, 64)
        assert output.synthesized is False


def test_pooled_equals_transformers_pooler_output(tower):
    folder, encoder_class, oracle, *_ = tower
    encoder = encoder_class.from_pretrained(folder)
    pixels = pixels_of(encoder)
    assert torch.equal(encoder(pixels, output_pooled=True).pooled, oracle(pixels).pooler_output)


def test_select_feature_follows_the_class_token(tower):
    folder, encoder_class, oracle, prefix, has_class_token = tower
    pixels = pixels_of(encoder_class.from_pretrained(folder))
    hidden = hidden_states(oracle, pixels)[-2]
    full = torch.cat([hidden[:, :1], hidden[:, prefix:]], dim=1) if has_class_token else hidden
    assert torch.equal(
        encoder_class.from_pretrained(folder, select_feature="full")(pixels).patch_tokens, full
    )
    for feature, expected in (("cls_patch", full), ("cls", hidden[:, :1])):
        if has_class_token:
            encoder = encoder_class.from_pretrained(folder, select_feature=feature)
            assert torch.equal(encoder(pixels).patch_tokens, expected)
            assert encoder.num_patches == expected.shape[1]
        else:
            with pytest.raises(ValueError, match="this trunk has no class token"):
                encoder_class.from_pretrained(folder, select_feature=feature)


def test_final_norm_and_lists_of_layers(tower):
    folder, encoder_class, oracle, prefix, _ = tower
    encoder = encoder_class.from_pretrained(folder, final_norm=True, select_layer=[-1, 1])
    pixels = pixels_of(encoder)
    norm = oracle.post_layernorm if hasattr(oracle, "post_layernorm") else oracle.layernorm
    states = hidden_states(oracle, pixels)
    expected = torch.cat([norm(states[layer])[:, prefix:] for layer in (-1, 1)], dim=-1)
    assert torch.equal(encoder(pixels).patch_tokens, expected)
    assert encoder.hidden_size == 128


@pytest.mark.parametrize("size", [96, (64, 128)])
def test_other_image_size_equals_transformers_interpolation(tower, size):
    folder, encoder_class, oracle, prefix, _ = tower
    encoder = encoder_class.from_pretrained(folder, image_size=size)
    pixels = pixels_of(encoder)
    options = {} if encoder_class is Dinov2Encoder else {"interpolate_pos_encoding": True}
    expected = hidden_states(oracle, pixels, **options)[-2][:, prefix:]
    assert torch.equal(encoder(pixels).patch_tokens, expected)
    assert encoder.num_patches == expected.shape[1]
    values = encoder.image_processor(Image.new("RGB", (300, 200)), return_tensors="pt")[
        "pixel_values"
    ]
    assert tuple(values.shape[2:]) == encoder.config.image_hw
    with pytest.raises(
        ValueError, match=r"100x100 pixels do not divide.*nearest size that does is 96x96"
    ):
        encoder_class.from_pretrained(folder, image_size=100)


def test_image_processor_is_the_repos_own(tower):
    folder, encoder_class, *_ = tower
    is_naflex = (
        encoder_class is Siglip2Encoder
    )  # keeps proportions, so equal for square images only
    shape = (130, 130, 3) if is_naflex else (90, 130, 3)
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8))
    encoder = encoder_class.from_pretrained(folder)
    theirs = transformers.AutoImageProcessor.from_pretrained(folder)
    expected = theirs(image, return_tensors="pt")["pixel_values"]
    ours = encoder.image_processor(image, return_tensors="pt")["pixel_values"]
    if is_naflex:
        assert torch.equal(convert_image_to_patches(ours[0], 16)[None], expected)
        expected = ours
    assert torch.equal(ours, expected)
    assert torch.equal(encoder.encode(image), encoder(expected).patch_tokens)


def test_bfloat16_equals_transformers(tower):
    folder, encoder_class, oracle, prefix, _ = tower
    encoder = encoder_class.from_pretrained(folder, dtype=torch.bfloat16)
    theirs = type(oracle).from_pretrained(folder, dtype=torch.bfloat16).eval()
    pixels = pixels_of(encoder).bfloat16()
    assert encoder.dtype == torch.bfloat16
    assert torch.equal(encoder(pixels).patch_tokens, hidden_states(theirs, pixels)[-2][:, prefix:])


def test_saved_encoder_reloads_bit_for_bit_and_is_detected(tower, tmp_path):
    folder, encoder_class, *_ = tower
    encoder = encoder_class.from_pretrained(folder, image_size=96, select_layer=-1)
    encoder.save_pretrained(tmp_path)
    pixels = pixels_of(encoder)
    for again in (AutoModel.from_pretrained(tmp_path), create_encoder("auto", tmp_path)):
        assert type(again) is encoder_class
        expected = in_fresh_memory(encoder)(pixels).patch_tokens
        assert torch.equal(in_fresh_memory(again)(pixels).patch_tokens, expected)
        assert again.image_processor.to_dict() == encoder.image_processor.to_dict()


def test_auto_detection_reads_the_config(tower):
    folder, encoder_class, *_ = tower
    encoder = create_encoder(None, folder, select_layer=-1)
    assert type(encoder) is encoder_class
    assert encoder.config.tower == folder.name


def test_gradient_reaches_the_pixels(tower):
    folder, encoder_class, *_ = tower
    encoder = encoder_class.from_pretrained(folder).requires_grad_(False)
    pixels = pixels_of(encoder).requires_grad_()
    encoder(pixels).patch_tokens.square().sum().backward()
    assert pixels.grad.abs().sum() > 0
    assert all(p.grad is None for p in encoder.parameters())


def test_missing_weights_are_an_error_with_their_names(tower, tmp_path):
    folder, encoder_class, oracle, *_ = tower
    encoder_class.from_pretrained(folder)
    state = oracle.state_dict()
    name = next(name for name in state if "mlp" in name)
    del state[name]
    oracle.save_pretrained(tmp_path, state_dict=state)
    with pytest.raises(ValueError, match=r"do not fit its configuration\. missing keys: .*mlp"):
        encoder_class.from_pretrained(tmp_path)


def test_loading_a_whole_clip_logs_no_page_of_text_weights(tmp_path, caplog):
    write_clip(tmp_path)
    library = logging.getLogger("transformers")
    library.addHandler(caplog.handler)  # transformers' loggers do not propagate
    try:
        transformers.CLIPVisionModel.from_pretrained(tmp_path)
        assert "UNEXPECTED" in caplog.text
        caplog.clear()
        ClipEncoder.from_pretrained(tmp_path)
        assert "UNEXPECTED" not in caplog.text
    finally:
        library.removeHandler(caplog.handler)


@pytest.mark.slow
def test_compiled_and_exported_towers_give_the_same_tokens(tower):
    folder, encoder_class, *_ = tower
    encoder = encoder_class.from_pretrained(folder).requires_grad_(False)
    pixels = pixels_of(encoder)
    torch._dynamo.reset()
    compiled = torch.compile(encoder, fullgraph=True, backend="aot_eager")
    assert torch.allclose(compiled(pixels).patch_tokens, encoder(pixels).patch_tokens, atol=1e-5)
    exported = torch.export.export(encoder, (pixels,)).module()
    assert torch.allclose(exported(pixels)["patch_tokens"], encoder(pixels).patch_tokens, atol=1e-5)
