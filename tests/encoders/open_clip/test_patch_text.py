"""Words on patches, against open_clip's own way from the class token to the texts."""

import pytest
import torch
from PIL import Image

from moellava.encoders import BiomedClipEncoder
from moellava.testing import write_biomedclip

TEXTS = ["a lung", "a heart", "a kidney"]


@pytest.fixture(scope="module")
def encoder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("clip") / "biomedclip_test"
    write_biomedclip(folder, vision="test_vit", image_size=160)
    return BiomedClipEncoder.from_pretrained(str(folder), load_text=True)


@pytest.fixture(scope="module")
def image():
    return Image.effect_noise((300, 200), 80).convert("RGB")


def test_patches_take_the_way_of_the_class_token(encoder, image):
    """timm's own last hidden state; the class token through the same layers is `encode_image`."""
    found = encoder.patch_similarity(image, TEXTS)
    pixels = encoder.image_processor([image], return_tensors="pt")["pixel_values"]
    with torch.no_grad():
        tokens = encoder.visual.trunk.forward_features(pixels)  # (1, 1 + N, D), after the norm
        vectors = torch.nn.functional.normalize(encoder.visual.head(tokens[0]), dim=-1)
        pooled = encoder.visual_vectors(pixels)
    torch.testing.assert_close(vectors[:1], pooled)
    expected = (encoder.encode_text(TEXTS) @ vectors[1:].T).reshape(3, 10, 10)
    torch.testing.assert_close(found, expected)


def test_value_attention_equals_a_block_written_out(encoder, image):
    found = encoder.patch_similarity(image, TEXTS, attention="value")
    pixels = encoder.image_processor([image], return_tensors="pt")["pixel_values"]
    trunk = encoder.visual.trunk
    with torch.no_grad():
        x = trunk._pos_embed(trunk.patch_embed(pixels))
        for block in trunk.blocks[:-1]:
            x = block(x)
        block = trunk.blocks[-1]
        width, heads = x.shape[-1], block.attn.num_heads
        values = block.attn.qkv(block.norm1(x))[0, :, 2 * width :]  # (T, D)
        mixed = []
        for own in values.split(width // heads, dim=1):
            scores = own @ own.T / (width // heads) ** 0.5
            mixed.append(scores.softmax(-1) @ own)
        x = trunk.norm(block.attn.proj(torch.cat(mixed, dim=1)))
        vectors = torch.nn.functional.normalize(encoder.visual.head(x), dim=-1)
    expected = (encoder.encode_text(TEXTS) @ vectors[1:].T).reshape(3, 10, 10)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(found, encoder.patch_similarity(image, TEXTS), atol=1e-2)


def test_the_tower_is_left_as_it_was(encoder, image):
    before = encoder.patch_similarity(image, TEXTS)
    encoder.patch_similarity(image, TEXTS, attention="value")
    torch.testing.assert_close(encoder.patch_similarity(image, TEXTS), before)


@pytest.mark.parametrize(
    ("texts", "options", "message"),
    [
        ([], {}, "at least one text"),
        ("a lung", {}, "give a list"),
        (TEXTS, {"attention": "key"}, "Unknown attention 'key'"),
    ],
)
def test_what_cannot_be_asked(encoder, image, texts, options, message):
    with pytest.raises(ValueError, match=message):
        encoder.patch_similarity(image, texts, **options)


def test_a_tower_without_its_texts_says_how_to_load_them(small_biomedclip, image):
    encoder = BiomedClipEncoder.from_pretrained(str(small_biomedclip))
    with pytest.raises(ValueError, match="load_text=True"):
        encoder.patch_similarity(image, TEXTS)


def test_a_convolutional_tower_is_refused(tmp_path, image):
    folder = write_biomedclip(tmp_path / "biomedclip_resnet", vision="test_resnet", image_size=64)
    encoder = BiomedClipEncoder.from_pretrained(str(folder), load_text=True)
    with pytest.raises(ValueError, match="need a plain transformer"):
        encoder.patch_similarity(image, TEXTS)
