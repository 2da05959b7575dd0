"""`encode`: any image, any batch size, the encoder's dtype."""

import numpy as np
import pytest
import torch
from PIL import Image

from moellava.encoders import BiomedClipEncoder


@pytest.fixture(scope="module")
def encoder(small_biomedclip):
    return BiomedClipEncoder.from_pretrained(small_biomedclip)


def random_images(count: int = 5) -> list[Image.Image]:
    random = np.random.default_rng(0)
    return [
        Image.fromarray(random.integers(0, 256, (40 + 9 * i, 70, 3), dtype=np.uint8))
        for i in range(count)
    ]


def test_encode_takes_every_kind_of_image(encoder, tmp_path):
    image = random_images(1)[0]
    array = np.asarray(image)
    image.save(tmp_path / "image.png")
    expected = encoder(
        encoder.image_processor(image, return_tensors="pt")["pixel_values"]
    ).patch_tokens
    assert expected.shape == (1, 196, 192)
    forms = [
        image,
        str(tmp_path / "image.png"),
        tmp_path / "image.png",
        array,
        array / 255,
        [image],
    ]
    forms += [torch.from_numpy(array.copy()).permute(2, 0, 1), torch.from_numpy(array.copy())[None]]
    for form in forms:
        tokens = encoder.encode(form)
        assert torch.allclose(tokens, expected, atol=1e-5)
        assert not tokens.requires_grad


def test_batches_equal_single_images_in_order(encoder):
    images = random_images()
    singles = torch.cat([encoder.encode(image) for image in images])
    for batch_size in (1, 2, 3, 16):
        assert torch.allclose(encoder.encode(images, batch_size=batch_size), singles, atol=1e-5)


def test_progress_bar_is_shown_only_when_asked_for(encoder, capsys):
    encoder.encode(random_images(2))
    assert capsys.readouterr().err == ""
    encoder.encode(random_images(2), progress=True)
    assert "1/1" in capsys.readouterr().err


def test_tokens_come_in_the_encoders_dtype(small_biomedclip):
    encoder = BiomedClipEncoder.from_pretrained(small_biomedclip, dtype="bfloat16")
    assert encoder.encode(random_images(1)).dtype == torch.bfloat16


def test_nothing_to_encode_and_wrong_batches_are_errors(encoder):
    with pytest.raises(ValueError, match="no images"):
        encoder.encode([])
    with pytest.raises(ValueError, match="batch_size is 0"):
        encoder.encode(random_images(1), batch_size=0)
