"""The files of an open_clip checkpoint: which are found, their order, and what broken ones say."""

import json
import os
import pickle
import shutil
from pathlib import Path

import pytest
import torch
from huggingface_hub.errors import EntryNotFoundError, GatedRepoError, LocalEntryNotFoundError
from safetensors.torch import save_file

from moellava.encoders import BiomedClipEncoder, parse_source, resolve
from moellava.encoders.open_clip.files import WEIGHT_FILES, Resolved, read_open_clip_config
from moellava.storage import sources as sources_module
from moellava.storage.sources import HubOptions
from moellava.storage.weights import read_weights
from moellava.testing import BIOMEDCLIP, REVISION


@pytest.fixture
def repo(architecture, tmp_path) -> Path:
    """A copy of a small open_clip repo that a test may break."""
    return Path(shutil.copytree(architecture("vit"), tmp_path / "my_tower"))


def found(spec, *, download: bool = False, **hub) -> Resolved:
    return resolve(parse_source(spec, HubOptions(**hub)), download=download)


def state_of(repo: Path) -> dict:
    return torch.load(repo / "open_clip_pytorch_model.bin", weights_only=True)


# ---- sources ----


def test_existing_path_wins_over_the_hub_whatever_its_name(repo, monkeypatch):
    monkeypatch.chdir(repo.parent)
    shutil.copytree(repo, BIOMEDCLIP)
    source = parse_source(BIOMEDCLIP)
    assert source.repo_id is None
    assert source.folder == Path.cwd() / BIOMEDCLIP
    assert BiomedClipEncoder.from_pretrained(BIOMEDCLIP).hidden_size == 64


def test_weights_file_is_read_with_the_config_beside_it(repo):
    file = repo / "epoch_7.pt"
    shutil.copy(repo / "open_clip_pytorch_model.bin", file)
    assert found(file).weights_file == file
    assert found(repo).weights_file == repo / "open_clip_pytorch_model.bin"
    encoder = BiomedClipEncoder.from_pretrained(file)
    assert encoder.config.tower == "my_tower"


def test_cache_snapshot_keeps_its_hub_name_and_commit(hub_cache):
    source = parse_source(hub_cache[BIOMEDCLIP])
    assert (source.name, source.revision) == (BIOMEDCLIP, REVISION)
    assert resolve(source).weights_file == hub_cache[BIOMEDCLIP] / "open_clip_pytorch_model.bin"


@pytest.mark.parametrize("revision", [None, "main", REVISION])
def test_hub_id_resolves_in_the_cache_without_network(hub_cache, revision, no_network):
    files = found(BIOMEDCLIP, revision=revision)
    assert files.config_file == hub_cache[BIOMEDCLIP] / "open_clip_config.json"
    assert files.weights_file == hub_cache[BIOMEDCLIP] / "open_clip_pytorch_model.bin"
    assert files.missing == []
    assert files.source.revision == REVISION


def test_cache_dir_is_where_files_are_looked_for(hub_cache, tmp_path, no_network):
    shutil.copytree(
        hub_cache[BIOMEDCLIP].parents[1], tmp_path / hub_cache[BIOMEDCLIP].parents[1].name
    )
    assert found(BIOMEDCLIP, cache_dir=tmp_path).config_file.is_relative_to(tmp_path)


# ---- order of files ----


def test_safetensors_come_before_pickles_and_lone_pt_files_last(repo):
    state = state_of(repo)
    (repo / "open_clip_pytorch_model.bin").unlink()
    torch.save(state, repo / "only.pt")
    assert found(repo).weights_name == "only.pt"
    for name in reversed(WEIGHT_FILES):
        save_file(state, repo / name) if name.endswith("safetensors") else torch.save(
            state, repo / name
        )
        assert found(repo).weights_name == name
        assert BiomedClipEncoder.from_pretrained(repo).num_patches == 16


def test_several_unnamed_files_are_not_guessed_between(repo):
    (repo / "open_clip_pytorch_model.bin").rename(repo / "a.pt")
    shutil.copy(repo / "a.pt", repo / "b.pth")
    with pytest.raises(
        FileNotFoundError, match=r"several \.pt/\.pth files.*a\.pt, b\.pth.*Name the file itself"
    ):
        found(repo)
    assert found(repo / "b.pth").weights_name == "b.pth"


def test_training_checkpoint_of_open_clip_is_read(repo):
    state = {f"module.{key}": value for key, value in state_of(repo).items()}
    torch.save(
        {"epoch": 3, "state_dict": state, "optimizer": {"lr": 1.0}},
        repo / "open_clip_pytorch_model.bin",
    )
    assert BiomedClipEncoder.from_pretrained(repo).hidden_size == 64


# ---- what the hub says (no hub is reached: its client is replaced) ----


def failing_download(monkeypatch, error_of):
    def download(repo_id, name, **options):
        raise error_of(name)

    monkeypatch.setattr(sources_module, "hf_hub_download", download)


def test_gated_repo_names_the_reason_and_the_command(monkeypatch):
    from huggingface_hub.utils import httpx

    response = httpx.Response(403, request=httpx.Request("GET", "https://example.invalid"))
    failing_download(
        monkeypatch, lambda name: GatedRepoError("Access to it is restricted.", response=response)
    )
    with pytest.raises(
        OSError,
        match=r"me/gated: cannot get open_clip_config\.json: Access to it is restricted.*hf",
    ):
        BiomedClipEncoder.from_pretrained("me/gated")


def test_offline_hub_names_the_file_and_the_command():
    message = (
        r"me/x: cannot get open_clip_config\.json: it is not in the cache.*"
        "hf download me/x open_clip_config"
    )
    with pytest.raises(OSError, match=message):
        found("me/x", download=True)
    with pytest.raises(OSError, match="--revision abc"):
        found("me/x", download=True, revision="abc")


def test_repo_without_weights_lists_the_names_tried(monkeypatch, tmp_path):
    (tmp_path / "open_clip_config.json").write_text("{}")

    def download(repo_id, name, **options):
        if name == "open_clip_config.json":
            return str(tmp_path / name)
        raise EntryNotFoundError(f"404 {name}")

    monkeypatch.setattr(sources_module, "hf_hub_download", download)
    with pytest.raises(
        OSError, match=r"one of open_clip_model\.safetensors, .*no file of weights was found"
    ):
        found("me/x", download=True)


def test_downloads_stay_on_the_commit_of_the_config(monkeypatch, tmp_path):
    folder = tmp_path / "models--me--x" / "snapshots" / ("c" * 40)
    folder.mkdir(parents=True)
    asked = []

    def download(repo_id, name, revision=None, **options):
        asked.append((name, revision))
        if name == "open_clip_model.safetensors":
            raise LocalEntryNotFoundError("no")
        (folder / name).write_text("{}")
        return str(folder / name)

    monkeypatch.setattr(sources_module, "hf_hub_download", download)
    files = found("me/x", download=True, revision="v1")
    assert files.weights_name == "open_clip_pytorch_model.safetensors"
    assert asked[0] == ("open_clip_config.json", "v1")
    assert {revision for _, revision in asked[1:]} == {"c" * 40}


# ---- broken files ----


def test_config_without_an_image_tower_is_refused(repo):
    for content in ({}, {"model_cfg": {"text_cfg": {}}}):
        (repo / "open_clip_config.json").write_text(json.dumps(content))
        with pytest.raises(
            ValueError, match=r"open_clip_config\.json has no model_cfg\.vision_cfg"
        ):
            BiomedClipEncoder.from_pretrained(repo)
    (repo / "open_clip_config.json").write_text("{")
    with pytest.raises(ValueError, match=r"open_clip_config\.json .*cannot be read as JSON"):
        BiomedClipEncoder.from_pretrained(repo)
    (repo / "open_clip_config.json").unlink()
    with pytest.raises(
        FileNotFoundError,
        match=r"has no open_clip_config\.json.*holds open_clip_pytorch_model\.bin",
    ):
        BiomedClipEncoder.from_pretrained(repo)


def test_folder_without_weights_lists_what_it_holds(repo):
    (repo / "open_clip_pytorch_model.bin").unlink()
    with pytest.raises(
        FileNotFoundError,
        match=r"has no weights; expected one of .* It holds open_clip_config\.json",
    ):
        BiomedClipEncoder.from_pretrained(repo)


@pytest.mark.parametrize("name", ["open_clip_pytorch_model.bin", "open_clip_model.safetensors"])
@pytest.mark.parametrize("keep", [0, 0.5, 0.999])
def test_truncated_weights_are_named(repo, name, keep):
    if name.endswith("safetensors"):
        save_file(state_of(repo), repo / name)
    size = (repo / name).stat().st_size
    os.truncate(repo / name, int(size * keep))
    with pytest.raises(ValueError, match=rf"{name}.* cannot be read as "):
        BiomedClipEncoder.from_pretrained(repo)


class Harmful:
    ran = False

    def __reduce__(self):
        return exec, ("tests.encoders.open_clip.test_files.Harmful.ran = True",)


@pytest.mark.parametrize(
    "save", [torch.save, lambda value, path: path.write_bytes(pickle.dumps(value, protocol=2))]
)
def test_pickle_that_wants_to_run_code_is_refused_with_the_reason(repo, save):
    save({"visual.conv1.weight": Harmful()}, repo / "open_clip_pytorch_model.bin")
    with pytest.raises(
        ValueError,
        match=r"open_clip_pytorch_model\.bin is a pickle that wants more.*not opened.*exec",
    ):
        BiomedClipEncoder.from_pretrained(repo)
    assert not Harmful.ran


def test_missing_tensors_are_listed_five_and_a_count(repo):
    state = state_of(repo)
    gone = sorted(key for key in state if "resblocks.1." in key)
    torch.save(
        {key: value for key, value in state.items() if key not in gone},
        repo / "open_clip_pytorch_model.bin",
    )
    with pytest.raises(
        ValueError, match=r"missing keys: (transformer\S+, ){4}transformer\S+ and 7 more"
    ):
        BiomedClipEncoder.from_pretrained(repo)
    assert len(gone) == 12


def test_unknown_tensors_are_listed(repo):
    torch.save(
        state_of(repo) | {"visual.mystery": torch.zeros(2)}, repo / "open_clip_pytorch_model.bin"
    )
    with pytest.raises(ValueError, match="unexpected keys: mystery"):
        BiomedClipEncoder.from_pretrained(repo)


def test_wrong_shapes_name_both_shapes(repo):
    state = state_of(repo) | {"visual.proj": torch.zeros(64, 99)}
    torch.save(state, repo / "open_clip_pytorch_model.bin")
    with pytest.raises(
        ValueError, match=r"mismatched keys: proj: \(64, 99\) instead of \(64, 32\)"
    ):
        BiomedClipEncoder.from_pretrained(repo)


def test_text_only_checkpoint_is_recognised(repo):
    state = {key: value for key, value in state_of(repo).items() if not key.startswith("visual.")}
    torch.save(state, repo / "open_clip_pytorch_model.bin")
    with pytest.raises(ValueError, match=r"no tensor of an image tower.*text-only checkpoint"):
        BiomedClipEncoder.from_pretrained(repo)
    torch.save({"epoch": 3}, repo / "open_clip_pytorch_model.bin")
    with pytest.raises(ValueError, match="holds no tensors"):
        BiomedClipEncoder.from_pretrained(repo)


def test_both_spellings_of_the_text_keys_are_read(tmp_path):
    path = tmp_path / "open_clip_config.json"
    text_cfg = {"proj": "mlp", "pooler_type": "cls_last_hidden_state_pooler"}
    path.write_text(json.dumps({"model_cfg": {"vision_cfg": {}, "text_cfg": text_cfg}}))
    read = read_open_clip_config(path)["model_cfg"]["text_cfg"]
    assert read == {"hf_proj_type": "mlp", "hf_pooler_type": "cls_last_hidden_state_pooler"}


def test_only_the_tensors_asked_for_are_read(repo):
    state = state_of(repo)
    save_file(state, repo / "x.safetensors")
    for name in ("open_clip_pytorch_model.bin", "x.safetensors"):
        read = read_weights(repo / name, ("visual.",))
        assert set(read) == {key for key in state if key.startswith("visual.")}
