"""Files of patch tokens: written in batches, resumed after a kill, read by image."""

import copy
import json
import os
import pickle
import subprocess
import sys
import time

import pytest
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from moellava.encoders import BiomedClipEncoder, feature_file
from moellava.encoders.feature_file import FeatureFile, encode_files
from moellava.storage.locking import locked
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
    good, facts = paths[4].read_bytes(), paths[4].stat()
    paths[4].write_bytes(bytes(len(good)))
    os.utime(paths[4], ns=(facts.st_atime_ns, facts.st_mtime_ns))
    out = tmp_path / "out.safetensors"
    with pytest.raises(ValueError, match=r"4\.png cannot be read as an image"):
        encode_files(encoder, paths, names, out, batch_size=2)
    assert not out.exists()
    paths[4].write_bytes(good)
    os.utime(paths[4], ns=(facts.st_atime_ns, facts.st_mtime_ns))
    assert encode_files(encoder, paths, names, out, batch_size=2) >= 2
    assert torch.allclose(load_file(out)["patch_tokens"], encoder.encode(paths), atol=1e-5)


@pytest.fixture
def unfinished(encoder, files, tmp_path):
    """(out, its partial file): the images before the last one are done."""
    out = tmp_path / "out.safetensors"
    with pytest.raises(KeyboardInterrupt):
        encode_files(encoder, *files, out, batch_size=2, load_image=stopping_at(files[0][4]))
    return out, out.with_name("out.safetensors.partial")


def stopping_at(last):
    def load(path):
        if path == last:
            raise KeyboardInterrupt
        return Image.open(path)

    return load


@pytest.mark.parametrize(
    "change",
    [
        lambda size, file: None,
        lambda size, file: file.truncate(size - 7),  # a kill cut an image in two
        lambda size, file: file.truncate(size - 196 * 192 * 4),
    ],
)
def test_interrupted_work_is_resumed(encoder, files, unfinished, change):
    out, partial = unfinished
    with partial.open("rb+") as file:
        change(partial.stat().st_size, file)
    assert 2 <= encode_files(encoder, *files, out, batch_size=2) <= 4
    assert torch.allclose(load_file(out)["patch_tokens"], encoder.encode(files[0]), atol=1e-5)
    assert sorted(path.name for path in out.parent.glob("out*")) == ["out.safetensors"]


@pytest.mark.parametrize("change", ["images", "layer", "weights", "too long", "header cut"])
def test_unfinished_work_of_something_else_is_not_resumed(
    encoder, files, unfinished, small_biomedclip, change
):
    out, partial = unfinished
    if change == "images":  # the same names in another folder
        Image.new("RGB", (30, 30)).save(files[0][0])
    elif change == "layer":
        encoder = BiomedClipEncoder.from_pretrained(small_biomedclip, select_layer=-1)
    elif change == "weights":  # the same name, trained further
        encoder = copy.deepcopy(encoder)
        encoder.visual.trunk.cls_token.data += 1
    elif change == "too long":
        with partial.open("ab") as file:
            file.write(bytes(196 * 192 * 4 * 2))
    else:
        os.truncate(partial, 100)
    with pytest.raises(FileExistsError, match="unfinished work on other images or with another"):
        encode_files(encoder, *files, out, batch_size=2)


def test_two_processes_do_not_write_one_file(encoder, files, tmp_path):
    out = tmp_path / "out.safetensors"
    with locked(out), pytest.raises(OSError, match=r"in use by another process \(pid \d+ on"):
        encode_files(encoder, *files, out)
    assert encode_files(encoder, *files, out) == 0


def test_a_tower_with_damaged_weights_is_refused(encoder, files, tmp_path):
    damaged = copy.deepcopy(encoder)
    damaged.visual.trunk.blocks[0].mlp.fc1.bias.data[3] = float("nan")
    out = tmp_path / "out.safetensors"
    with pytest.raises(ValueError, match="gives NaN or infinity: its weights are damaged"):
        encode_files(damaged, *files, out)
    assert not out.exists()
    with pytest.raises(ValueError, match="gives NaN or infinity: its weights are damaged"):
        damaged.encode(files[0])


def test_names_that_are_too_many_for_a_header_have_a_tensor(encoder, files, tmp_path, monkeypatch):
    monkeypatch.setattr(feature_file, "MOST_NAMES_IN_HEADER", 10)
    out = tmp_path / "out.safetensors"
    encode_files(encoder, *files, out)
    file = FeatureFile(out)
    assert file.names == files[1]
    assert "names" not in file.metadata
    assert torch.equal(file.tokens("2.png"), load_file(out)["patch_tokens"][2])


KILLED = """
import sys, time
from pathlib import Path
from moellava.encoders import BiomedClipEncoder, feature_file
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
    partial = tmp_path / "out.safetensors.partial"
    one_image = encoder.num_patches * encoder.hidden_size * 4
    words = [sys.executable, "-c", KILLED, str(small_biomedclip), str(out), *map(str, paths)]
    process = subprocess.Popen(words)
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and not (
        partial.exists() and partial.stat().st_size > one_image
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
