"""The tower in bfloat16: what is chosen, what comes out, and what files remember."""

import logging
import re

import pytest
import torch
from safetensors.torch import load_file
from torch.nn.functional import cosine_similarity

from moellava.encoders import BiomedClipEncoder
from moellava.encoders.feature_file import FeatureFile, encode_files
from moellava.encoders.precision import choose_precision
from moellava.testing import in_fresh_memory
from tests.encoders.test_batches import random_images

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def encoder(small_biomedclip):
    return in_fresh_memory(BiomedClipEncoder.from_pretrained(small_biomedclip))


@pytest.mark.parametrize(
    ("capabilities", "dtype", "reason"),
    [
        ({"avx512_f": True, "avx512_bf16": True}, torch.bfloat16, r"multiplies .*avx512_bf16"),
        ({"neon": True, "bf16": True}, torch.bfloat16, r"multiplies .*bf16"),
        ({"avx512_f": True, "amx_bf16": False}, torch.float32, "does not multiply"),
    ],
)
def test_auto_follows_what_the_cpu_has_and_says_so(monkeypatch, capabilities, dtype, reason):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: capabilities)
    choice = choose_precision("auto", CPU)
    assert choice.dtype == dtype
    assert re.search(reason, choice.reason)


def test_bfloat16_equals_a_tower_that_was_loaded_so(encoder, small_biomedclip, caplog):
    images = random_images()
    caplog.set_level(logging.INFO, "moellava")
    found = encoder.encode(images, precision="bfloat16")
    half = in_fresh_memory(BiomedClipEncoder.from_pretrained(small_biomedclip, dtype="bfloat16"))
    assert torch.equal(found, half.encode(images))
    assert encoder.dtype == torch.float32
    exact = encoder.encode(images, precision="float32")
    assert torch.equal(exact, encoder.encode(images))
    assert cosine_similarity(found.float(), exact, dim=-1).min() > 0.999
    assert "the tower runs in bfloat16: as asked for" in caplog.text


def test_an_unknown_word_suggests_the_nearest(encoder):
    with pytest.raises(ValueError, match=r"Unknown precision 'bfloat'\. Did you mean 'bfloat16'"):
        encoder.encode(random_images(), precision="bfloat")


def test_the_file_remembers_and_two_precisions_are_not_mixed(encoder, tmp_path):
    images, names = random_images(), list("abcde")
    out = tmp_path / "out.safetensors"

    def stop(image, **view):
        if image is images[4]:
            raise KeyboardInterrupt
        return image

    with pytest.raises(KeyboardInterrupt):
        encode_files(
            encoder, images, names, out, batch_size=1, precision="bfloat16", load_image=stop
        )
    with pytest.raises(FileExistsError, match="in another precision; delete it to start anew"):
        encode_files(encoder, images, names, out, dtype=torch.bfloat16)
    assert encode_files(encoder, images, names, out, precision="bfloat16") > 0
    file = FeatureFile(out)
    assert (file.precision, file.dtype) == ("bfloat16", torch.bfloat16)
    found = load_file(out)["patch_tokens"]
    torch.testing.assert_close(found, encoder.encode(images, precision="bfloat16"))


def test_tokens_may_be_stored_wider_than_they_were_computed(encoder, tmp_path):
    out = tmp_path / "out.safetensors"
    options = {"precision": "bfloat16", "dtype": torch.float32}
    encode_files(encoder, random_images(), list("abcde"), out, **options)
    file = FeatureFile(out)
    assert (file.precision, file.dtype) == ("bfloat16", torch.float32)
