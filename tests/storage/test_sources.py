"""Every spelling of a place, single files of it, and what the hub says."""

import shutil
from pathlib import Path

import pytest
from huggingface_hub.errors import EntryNotFoundError, GatedRepoError, LocalEntryNotFoundError
from huggingface_hub.utils import httpx

from moellava.storage import sources
from moellava.storage.sources import (
    HubOptions,
    Origin,
    commit_of,
    find_file,
    origin_of,
    parse_source,
    read_json,
    split_hub_keywords,
)
from moellava.testing import BIOMEDCLIP, REVISION, TINYLLAMA


@pytest.fixture
def folder(tmp_path) -> Path:
    """A folder with a config and a file of weights."""
    folder = tmp_path / "my_tower"
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    (folder / "epoch_7.pt").touch()
    return folder


# ---- spellings ----


@pytest.mark.parametrize("spelling", [BIOMEDCLIP, f"hf-hub:{BIOMEDCLIP}", f" {BIOMEDCLIP}\n"])
def test_hub_spellings_name_one_repo(spelling):
    source = parse_source(spelling)
    assert (source.name, source.repo_id, source.folder) == (BIOMEDCLIP, BIOMEDCLIP, None)


def test_local_spellings_name_one_folder(folder, monkeypatch):
    monkeypatch.chdir(folder.parent)
    monkeypatch.setenv("HOME", str(folder.parent))
    for spelling in (
        folder,
        str(folder),
        f"local-dir:{folder}",
        "./my_tower",
        "~/my_tower",
        "my_tower",
        f"{folder}/",
    ):
        source = parse_source(spelling)
        assert (source.folder, source.name, source.repo_id) == (folder, "my_tower", None)


def test_existing_path_wins_over_the_hub_whatever_its_name(folder, monkeypatch):
    monkeypatch.chdir(folder.parent)
    shutil.copytree(folder, BIOMEDCLIP)
    source = parse_source(BIOMEDCLIP)
    assert (source.repo_id, source.folder) == (None, folder.parent / BIOMEDCLIP)
    assert parse_source(f"hf-hub:{BIOMEDCLIP}").folder is None


def test_file_of_weights_stands_for_its_folder(folder):
    source = parse_source(folder / "epoch_7.pt")
    assert (source.file, source.folder) == (folder / "epoch_7.pt", folder)
    with pytest.raises(ValueError, match=r"config\.json is not a file of weights; expected one of"):
        parse_source(folder / "config.json")


def test_cache_snapshot_keeps_its_hub_name_and_commit(hub_cache):
    source = parse_source(hub_cache[BIOMEDCLIP])
    assert (source.name, source.revision) == (BIOMEDCLIP, REVISION)
    assert parse_source(hub_cache[BIOMEDCLIP], HubOptions(revision=REVISION)) == source


def test_revision_of_a_folder_is_an_error(folder):
    with pytest.raises(ValueError, match=r"revision='main' was given, but .* is a local folder"):
        parse_source(folder, HubOptions(revision="main"))


@pytest.mark.parametrize("bad", ["a/b/c", "hf-hub:a/b/c", "", "what is this?"])
def test_neither_path_nor_repo_id_says_so(bad):
    with pytest.raises(ValueError, match=r"Hugging Face repo id \('owner/name'\)"):
        parse_source(bad)


@pytest.mark.parametrize("prefix", ["", "local-dir:"])
def test_missing_path_suggests_its_nearest_sibling(folder, prefix):
    message = r"my_towr does not exist\. Did you mean .*my_tower\?"
    with pytest.raises(FileNotFoundError, match=message):
        parse_source(f"{prefix}{folder.parent}/my_towr")
    with pytest.raises(FileNotFoundError, match=r"Nor does its folder"):
        parse_source(f"{prefix}{folder.parent}/no/where")


# ---- options of the hub ----


def test_a_token_is_passed_on_but_never_printed():
    hub = HubOptions(token="hf_secret", revision="v1")
    assert hub.keywords["token"] == "hf_secret"
    assert "hf_secret" not in f"{hub!r} {parse_source('me/x', hub)!r}"
    assert "token" not in HubOptions().keywords  # so that the login is used


def test_hub_keywords_are_told_from_the_rest():
    hub, rest = split_hub_keywords({"revision": "v1", "cache_dir": "/c", "dtype": "auto"})
    assert hub == HubOptions(revision="v1", cache_dir="/c")
    assert rest == {"dtype": "auto"}


# ---- single files ----


def test_cached_files_are_found_without_network(hub_cache, tmp_path, no_network):
    snapshot = hub_cache[BIOMEDCLIP]
    for revision in (None, "main", REVISION):
        source = parse_source(BIOMEDCLIP, HubOptions(revision=revision))
        assert find_file(source, "open_clip_config.json") == snapshot / "open_clip_config.json"
    elsewhere = parse_source(BIOMEDCLIP, HubOptions(cache_dir=tmp_path))
    assert find_file(elsewhere, "open_clip_config.json") is None


def test_missing_file_of_a_folder_suggests_its_nearest_sibling(folder):
    source = parse_source(folder)
    assert find_file(source, "cofig.json", required=False) is None
    with pytest.raises(FileNotFoundError, match=r"cofig\.json does not exist\. .*config\.json\?"):
        find_file(source, "cofig.json")


def test_commit_and_origin_come_from_the_cache(hub_cache, folder):
    assert commit_of(hub_cache[TINYLLAMA] / "config.json") == REVISION
    assert commit_of(folder / "config.json") is None
    assert origin_of(TINYLLAMA) == Origin(TINYLLAMA, REVISION)
    assert str(origin_of(TINYLLAMA)) == f"{TINYLLAMA}@{REVISION[:7]}"
    assert str(origin_of(folder)) == "my_tower"


# ---- what the hub says (no hub is reached: its client is replaced) ----


def response(status: int) -> httpx.Response:
    return httpx.Response(status, request=httpx.Request("GET", "https://example.invalid"))


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (GatedRepoError("It is restricted.", response=response(403)), "It is restricted"),
        (EntryNotFoundError("404"), "the repo has no such file"),
        (LocalEntryNotFoundError("no"), "not in the cache and the hub cannot be reached"),
        (httpx.ReadTimeout("the read timed out"), "the hub cannot be reached"),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, Exception) else "",
)
def test_failed_download_names_the_file_the_reason_and_the_command(monkeypatch, error, message):
    def download(repo_id: str, name: str, **options: object) -> str:
        raise error

    monkeypatch.setattr(sources, "hf_hub_download", download)
    source = parse_source("me/x", HubOptions(revision="abc", cache_dir="/c"))
    with pytest.raises(
        OSError, match=rf"me/x: cannot get a\.json: .*{message}.*hf download me/x a"
    ):
        find_file(source, "a.json", download=True)
    with pytest.raises(OSError, match=r"--revision abc --cache-dir /c"):
        find_file(source, "a.json", download=True)


# ---- JSON ----


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"{", r"\(1 bytes\) cannot be read as JSON: "),
        (b"", r".*it is empty"),
        (b"<html></html>", r".*it is a web page"),
        ("{}".encode("utf-16"), r".*it is UTF-16"),
        (b'{"name": "Z\xfcrich"}', r".*cannot be read as JSON: it is not UTF-8 at byte 11"),
        (b"[1]", "holds a JSON list; expected an object"),
    ],
)
def test_what_is_not_a_json_object_is_named(tmp_path, content, message):
    path = tmp_path / "some.json"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=rf"some\.json {message}"):
        read_json(path)
