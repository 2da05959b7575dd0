"""Files of patch tokens: written in batches, resumed after a kill, read by image."""

import json
import pickle
import subprocess
import sys
import time

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from moellava.encoders import BiomedClipEncoder
from moellava.encoders.feature_file import FeatureFile, encode_files
from tests.encoders.test_batches import random_images


@pytest.fixture(scope="module")
def encoder(small_biomedclip):
    return BiomedClipEncoder.from_pretrained(small_biomedclip)


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
from moellava.encoders.feature_file import encode_files
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
    with safe_open(out, framework="pt") as file:
        assert json.loads(file.metadata()["names"]) == names


# ---- reading ----


@pytest.fixture
def written(encoder, files, tmp_path):
    out = tmp_path / "out.safetensors"
    encode_files(encoder, *files, out, view={"frame": None}, metadata={"weights": "abc"})
    return out


def test_tokens_are_found_by_name_in_another_process_too(encoder, files, written):
    file = FeatureFile(written)
    assert file.names == files[1]
    assert (file.dtype, file.metadata["weights"]) == (torch.float32, "abc")
    expected = encoder.encode(files[0])
    assert torch.allclose(file.tokens("3.png"), expected[3], atol=1e-5)
    sent = pickle.loads(pickle.dumps(file))
    assert torch.equal(sent.tokens("3.png"), file.tokens("3.png"))
    with pytest.raises(ValueError, match=r"out\.safetensors has no features of the image 9\.png"):
        file.tokens("9.png")


def test_an_encoder_with_other_settings_is_refused(encoder, small_biomedclip, written):
    file = FeatureFile(written)
    file.require_encoder(encoder)
    for option, found in ({"select_layer": -1}, -2), ({"final_norm": True}, False):
        other = BiomedClipEncoder.from_pretrained(small_biomedclip, **option)
        (name,) = option
        with pytest.raises(ValueError, match=f"holds features of {name}={found}, but the model"):
            file.require_encoder(other)


def test_llavas_word_default_in_an_older_file_means_patch(encoder, written):
    metadata = FeatureFile(written).metadata | {"select_feature": json.dumps("default")}
    older = written.with_name("older.safetensors")
    save_file(load_file(written), older, metadata=metadata)
    FeatureFile(older).require_encoder(encoder)
