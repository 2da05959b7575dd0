"""`encode` and `encode_files`: any image, any batch, and work that survives a kill."""

import json
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from moellava.encoders import BiomedClipEncoder
from moellava.encoders.feature_file import encode_files


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


@pytest.fixture
def files(tmp_path):
    paths = [tmp_path / f"{i}.png" for i in range(5)]
    for path, image in zip(paths, random_images(), strict=True):
        image.save(path)
    return paths, [path.name for path in paths]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_written_features_equal_encode(small_biomedclip, files, tmp_path, dtype):
    encoder = BiomedClipEncoder.from_pretrained(small_biomedclip, dtype=dtype)
    out = tmp_path / "out.safetensors"
    assert encode_files(encoder, *files, out, batch_size=2) == 0
    assert torch.equal(load_file(out)["patch_tokens"], encoder.encode(files[0], batch_size=2))
    assert sorted(path.name for path in tmp_path.glob("out*")) == ["out.safetensors"]


def test_unreadable_image_is_named_and_the_work_before_it_kept(encoder, files, tmp_path):
    paths, names = files
    good = paths[4].read_bytes()
    paths[4].write_bytes(good[:50])
    out = tmp_path / "out.safetensors"
    with pytest.raises(ValueError, match=r"4\.png cannot be read as an image"):
        encode_files(encoder, paths, names, out, batch_size=2)
    assert not out.exists()
    paths[4].write_bytes(good)
    assert encode_files(encoder, paths, names, out, batch_size=2) >= 2
    assert torch.allclose(load_file(out)["patch_tokens"], encoder.encode(paths), atol=1e-5)


def test_unfinished_work_of_another_tower_is_not_continued(
    encoder, files, tmp_path, small_biomedclip
):
    paths, names = files
    out = tmp_path / "out.safetensors"
    paths[4].unlink()
    with pytest.raises(FileNotFoundError, match=r"4\.png does not exist"):
        encode_files(encoder, paths, names, out, batch_size=2)
    other = BiomedClipEncoder.from_pretrained(small_biomedclip, select_layer=-1)
    with pytest.raises(
        FileExistsError, match="unfinished work on other images or with another tower"
    ):
        encode_files(other, paths, names, out, batch_size=2)


KILLED = """
import sys, time
from pathlib import Path
from moellava.encoders import BiomedClipEncoder
from moellava.encoders.batches import encode_files
encoder = BiomedClipEncoder.from_pretrained(sys.argv[1])
encoder.register_forward_hook(lambda *call: time.sleep(1))
paths = [Path(name) for name in sys.argv[3:]]
encode_files(encoder, paths, [path.name for path in paths], Path(sys.argv[2]), batch_size=1)
"""


@pytest.mark.slow
def test_killed_run_continues_where_it_was(encoder, files, tmp_path, small_biomedclip):
    paths, names = files
    out = tmp_path / "out.safetensors"
    journal = tmp_path / "out.safetensors.partial.done"
    words = [sys.executable, "-c", KILLED, str(small_biomedclip), str(out), *map(str, paths)]
    process = subprocess.Popen(words)
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and not (
        journal.exists() and journal.read_text() in ("1", "2", "3")
    ):
        time.sleep(0.05)
    process.kill()
    process.wait()
    assert not out.exists()
    assert 1 <= encode_files(encoder, paths, names, out, batch_size=1) < 5
    assert torch.allclose(load_file(out)["patch_tokens"], encoder.encode(paths), atol=1e-5)
    assert json.loads(json.dumps(names)) == names
