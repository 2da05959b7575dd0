"""Whatever a tower's files hold, the error is of a kind that callers expect and names the file."""

import json
import random
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from moellava.encoders import ClipEncoder, create_encoder
from moellava.encoders.feature_file import FeatureFile, encode_files
from moellava.storage.errors import LFS_FIRST_LINE
from moellava.testing import BIOMEDCLIP, OPENAI_CLIP

EXPECTED = (ValueError, OSError, ImportError, TypeError)
MUTATIONS = 25
VALUES = (None, -1, 0, 1.5, "banana", [], {}, [None], True, "1e9", 10**6)


def mutated_json(content: object, generator: random.Random) -> object:
    """The content with one value, at any depth, replaced or removed."""
    places: list[tuple[dict | list, object]] = []

    def walk(node: object) -> None:
        pairs = node.items() if isinstance(node, dict) else enumerate(node)  # type: ignore[arg-type]
        for key, value in pairs:
            places.append((node, key))  # type: ignore[arg-type]
            if isinstance(value, dict | list):
                walk(value)

    walk(content)
    node, key = generator.choice(places)
    if generator.random() < 0.3:
        del node[key]  # type: ignore[arg-type]
    else:
        node[key] = generator.choice(VALUES)  # type: ignore[index]
    return content


def mutate(path: Path, seed: int) -> None:
    """Damage a file: for JSON half of the times one value, else bytes, or its length."""
    generator = random.Random(f"{path.name} {seed}")
    data = bytearray(path.read_bytes())
    if path.suffix == ".json" and seed % 2:
        path.write_text(json.dumps(mutated_json(json.loads(data), generator)))
        return
    kind = generator.choice(("cut", "flip", "insert"))
    # Headers are at the start and, of a zip file, at the end: that is where damage matters.
    place = generator.choice((generator.randrange(len(data)), generator.randrange(200) % len(data)))
    if kind == "cut":
        data = data[:place]
    elif kind == "flip":
        for index in range(place, min(place + generator.randrange(1, 9), len(data))):
            data[index] ^= 1 << generator.randrange(8)
    else:
        data[place:place] = generator.randbytes(generator.randrange(1, 9))
    path.write_bytes(data)


@pytest.fixture(scope="module")
def repos(hub_cache, small_biomedclip, tmp_path_factory) -> dict[str, Path]:
    """One folder of each kind that an encoder is loaded from."""
    folder = tmp_path_factory.mktemp("repos")
    found = {"biomedclip": small_biomedclip, "clip": hub_cache[OPENAI_CLIP]}
    for name, source in found.items():
        found[name] = Path(shutil.copytree(source, folder / name))
    ClipEncoder.from_pretrained(OPENAI_CLIP).save_pretrained(folder / "saved")
    return {**found, "saved": folder / "saved"}


def outcomes(path: Path, count: int, read: Callable[[], object]) -> Iterator[str]:
    """What is said, or nothing, for each of `count` ways to damage a file."""
    whole = path.read_bytes()
    try:
        for seed in range(count):
            mutate(path, seed)
            try:
                read()
                message = ""
            except EXPECTED as error:
                message = str(error)
            except Exception as error:
                raise AssertionError(f"{path.name}, mutation {seed}: {error!r}") from error
            yield message
            path.write_bytes(whole)
    finally:
        path.write_bytes(whole)


@pytest.mark.parametrize(
    ("repo", "name"),
    [
        ("biomedclip", "open_clip_config.json"),
        ("biomedclip", "open_clip_pytorch_model.bin"),
        ("clip", "config.json"),
        ("clip", "preprocessor_config.json"),
        ("clip", "model.safetensors"),
        ("saved", "config.json"),
        ("saved", "model.safetensors"),
    ],
)
def test_a_damaged_file_ends_in_an_error_that_names_it(repos, repo, name):
    folder = repos[repo]
    kind = "biomedclip" if repo == "biomedclip" else "clip"
    for message in outcomes(folder / name, MUTATIONS, lambda: create_encoder(kind, folder)):
        assert not message or folder.name in message, message


@pytest.mark.parametrize(
    ("repo", "name", "change", "message"),
    [
        ("clip", "config.json", {"vision_config": {"num_hidden_layers": 10**7}}, "_LAYERS"),
        ("clip", "config.json", {"vision_config": {"image_size": 10**6}}, "_SIDE"),
        ("clip", "preprocessor_config.json", {"size": {"shortest_edge": 10**6}}, "_SIDE"),
        ("saved", "config.json", {"tower_config": {"num_hidden_layers": 10**7}}, "_LAYERS"),
        ("biomedclip", "open_clip_config.json", {"model_cfg": {"embed_dim": 10**9}}, "_WIDTH"),
    ],
)
def test_sizes_without_bound_are_refused_before_memory_is_spent(
    repos, tmp_path, repo, name, change, message
):
    folder = Path(shutil.copytree(repos[repo], tmp_path / repo))
    content = json.loads((folder / name).read_text())
    for key, inner in change.items():
        content[key] = {**content[key], **inner}
    (folder / name).write_text(json.dumps(content))
    kind = "biomedclip" if repo == "biomedclip" else "clip"
    with pytest.raises(ValueError, match=f"MOELLAVA_MAX{message}="):
        create_encoder(kind, folder)


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json", "vocab.txt"])
def test_a_damaged_tokenizer_ends_in_an_error_that_names_it(repos, name):
    folder = repos["biomedclip"]
    if not (folder / name).exists():
        pytest.skip(f"the stand-in has no {name}")

    def load() -> None:
        create_encoder("biomedclip", folder, load_text=True)

    for message in outcomes(folder / name, MUTATIONS // 4, load):
        assert not message or folder.name in message, message


def test_a_damaged_file_of_features_ends_in_an_error_that_names_it(repos, tmp_path):
    encoder = create_encoder("clip", repos["clip"])
    images = [Image.new("RGB", (30, 30), (level, 0, 0)) for level in (0, 200)]
    out = tmp_path / "features.safetensors"
    encode_files(encoder, images, ["a", "b"], out)

    def read() -> None:
        file = FeatureFile(out)
        file.require_encoder(encoder)
        _ = file.tokens("b"), file.dtype

    for message in outcomes(out, 4 * MUTATIONS, read):
        assert not message or out.name in message, message


# ---- one by one ----


def test_weights_outside_the_folder_are_not_read(repos, tmp_path):
    folder = Path(shutil.copytree(repos["clip"], tmp_path / "inner" / "clip"))
    (folder / "model.safetensors").rename(tmp_path / "inner" / "outside.safetensors")
    index = {"metadata": {}, "weight_map": {"x": "../outside.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(ValueError, match=r"index\.json names the file '\.\./outside.safetensors'"):
        create_encoder("clip", folder)


@pytest.mark.parametrize("name", ["open_clip_config.json", "open_clip_pytorch_model.bin"])
def test_a_git_lfs_pointer_is_called_one(repos, tmp_path, name):
    folder = Path(shutil.copytree(repos["biomedclip"], tmp_path / "biomedclip"))
    (folder / name).write_bytes(LFS_FIRST_LINE + b"\noid sha256:0123\nsize 34567\n")
    with pytest.raises(ValueError, match=rf"{name} is a Git LFS pointer"):
        create_encoder("biomedclip", folder)


def test_a_git_lfs_pointer_of_transformers_is_called_one(repos, tmp_path):
    folder = Path(shutil.copytree(repos["clip"], tmp_path / "clip"))
    (folder / "model.safetensors").write_bytes(LFS_FIRST_LINE + b"\noid sha256:0123\nsize 34567\n")
    with pytest.raises(ValueError, match=r"model\.safetensors is a Git LFS pointer"):
        create_encoder("clip", folder)


@pytest.mark.parametrize("config", [{}, {"model_type": "clip"}, {"model_type": "of-somebody"}])
def test_a_config_json_beside_biomedclips_files_does_not_count(hub_cache, repos, tmp_path, config):
    folder = Path(shutil.copytree(repos["biomedclip"], tmp_path / "biomedclip"))
    expected = create_encoder("auto", folder, load_text=True)
    (folder / "config.json").write_text(json.dumps(config))
    encoder = create_encoder("auto", folder, load_text=True)
    assert type(encoder) is type(expected)
    assert encoder.encode_text(["a"]).equal(expected.encode_text(["a"]))


@pytest.mark.parametrize("wrapper", ["model", "state_dict"])
@pytest.mark.parametrize("prefix", ["", "_orig_mod.", "module."])
def test_wrapped_weights_of_a_training_run_are_read(repos, tmp_path, wrapper, prefix):
    folder = Path(shutil.copytree(repos["biomedclip"], tmp_path / "biomedclip"))
    path = folder / "open_clip_pytorch_model.bin"
    state = torch.load(path, weights_only=True)
    renamed = {f"{prefix}{name}": value for name, value in state.items()}
    torch.save({wrapper: renamed, "epoch": 3}, path)
    assert create_encoder("biomedclip", folder).num_patches == 196
    path.unlink()
    save_file(renamed, folder / "open_clip_model.safetensors")
    assert create_encoder("biomedclip", folder).num_patches == 196


@pytest.mark.parametrize(
    ("path", "hint"),
    [
        (r"C:\models\BiomedCLIP", "a path of Windows"),
        (r"\\server\share\clip", "a path of Windows"),
        (
            "/home/a/.cache/huggingface/hub/models--openai--clip-vit/snapshots/abc",
            "another machine's cache of 'openai/clip-vit'; give that id",
        ),
        (f"/elsewhere/{BIOMEDCLIP}", "does not exist"),
    ],
)
def test_towers_named_by_a_path_of_another_machine_are_told_so(path, hint):
    with pytest.raises(FileNotFoundError, match=hint):
        create_encoder("auto", path)
