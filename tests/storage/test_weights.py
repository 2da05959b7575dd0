"""Tensors of a file, and the one strict check of loading."""

import json
import os
import pickle
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from moellava.storage.errors import LFS_FIRST_LINE
from moellava.storage.sources import HubOptions, parse_source
from moellava.storage.weights import (
    assign_weights,
    nonfinite_names,
    read_index,
    read_weights,
    require_finite,
    require_fit,
    require_loaded,
    require_own_files,
)

STATE = {"a.weight": torch.ones(2, 3), "a.bias": torch.zeros(2), "b.weight": torch.ones(4)}


def write(path: Path, state: dict[str, torch.Tensor] = STATE) -> Path:
    save_file(state, path) if path.suffix == ".safetensors" else torch.save(state, path)
    return path


@pytest.mark.parametrize("name", ["x.safetensors", "x.bin", "x.pt"])
def test_only_the_tensors_asked_for_are_read(tmp_path, name):
    path = write(tmp_path / name)
    assert set(read_weights(path)) == set(STATE)
    read = read_weights(path, ("a.",))
    assert set(read) == {"a.weight", "a.bias"}
    assert torch.equal(read["a.weight"], STATE["a.weight"])


def test_pickles_of_torch_before_1_6_are_read(tmp_path):
    torch.save(STATE, tmp_path / "old.bin", _use_new_zipfile_serialization=False)
    assert set(read_weights(tmp_path / "old.bin")) == set(STATE)


def test_training_checkpoint_of_open_clip_is_read(tmp_path):
    state = {f"module.{key}": value for key, value in STATE.items()}
    torch.save({"epoch": 3, "state_dict": state, "optimizer": {"lr": 1.0}}, tmp_path / "x.pt")
    assert set(read_weights(tmp_path / "x.pt")) == set(STATE)


@pytest.mark.parametrize("name", ["x.bin", "x.safetensors"])
@pytest.mark.parametrize("keep", [0, 0.5, 0.999])
def test_truncated_files_are_named(tmp_path, name, keep):
    path = write(tmp_path / name)
    os.truncate(path, int(path.stat().st_size * keep))
    with pytest.raises(ValueError, match=rf"{name} \(\d+ bytes\) cannot be read as "):
        read_weights(path)


@pytest.mark.parametrize("wrapper", ["state_dict", "model", "model_state_dict", "module"])
@pytest.mark.parametrize("prefix", ["", "module.", "_orig_mod.", "module._orig_mod."])
def test_wrappers_of_training_loops_are_taken_off(tmp_path, wrapper, prefix):
    state = {f"{prefix}{key}": value for key, value in STATE.items()}
    torch.save({"epoch": 3, wrapper: state}, tmp_path / "x.bin")
    assert set(read_weights(tmp_path / "x.bin")) == set(STATE)
    save_file(state, tmp_path / "x.safetensors")
    assert set(read_weights(tmp_path / "x.safetensors", ("a.",))) == {"a.weight", "a.bias"}


@pytest.mark.parametrize("name", ["x.bin", "x.safetensors"])
def test_a_git_lfs_pointer_is_called_one(tmp_path, name):
    (tmp_path / name).write_bytes(LFS_FIRST_LINE + b"\noid sha256:0123\nsize 34567\n")
    with pytest.raises(ValueError, match=rf"{name} is a Git LFS pointer"):
        read_weights(tmp_path / name)


# ---- sharded weights ----


def write_index(folder: Path, *files: str) -> Path:
    path = folder / "model.safetensors.index.json"
    weight_map = {f"t{number}": name for number, name in enumerate(files)}
    path.write_text(json.dumps({"weight_map": weight_map}))
    return path


def test_an_index_names_files_of_its_folder(tmp_path):
    path = write_index(tmp_path, "model-00001-of-00002.safetensors", "..a.safetensors")
    assert read_index(path) == {"t0": "model-00001-of-00002.safetensors", "t1": "..a.safetensors"}
    require_own_files(parse_source(tmp_path))


@pytest.mark.parametrize(
    "name",
    ["../x.safetensors", "/x.safetensors", "sub/x.safetensors", "..", "", "C:x", "..\\x", "a/../x"],
)
def test_an_index_that_leaves_its_folder_is_refused(tmp_path, name):
    path = write_index(tmp_path, "model-00001-of-00002.safetensors", name)
    for read, place in ((read_index, path), (require_own_files, parse_source(tmp_path))):
        with pytest.raises(ValueError, match=r"index\.json names the file .* is not a plain name"):
            read(place)


def test_an_index_in_the_cache_of_the_hub_is_checked_too(tmp_path):
    snapshot = tmp_path / "models--a--b" / "snapshots" / ("f" * 40)
    snapshot.mkdir(parents=True)
    write_index(snapshot, "../outside.safetensors")
    source = parse_source("a/b", HubOptions(revision="f" * 40, cache_dir=tmp_path))
    with pytest.raises(ValueError, match=r"names the file '\.\./outside\.safetensors'"):
        require_own_files(source)


def test_weights_beside_an_adapter_are_refused(tmp_path):
    """transformers would read the weights of the base that the adapter names."""
    (tmp_path / "adapter_config.json").write_text('{"base_model_name_or_path": "/elsewhere"}')
    with pytest.raises(ValueError, match=r"adapter_config\.json is of an adapter.*Merge it"):
        require_own_files(parse_source(tmp_path))


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_one_value_among_many_that_is_not_finite_is_found(value, dtype):
    weights = {"good": torch.ones(70_000, dtype=dtype), "bad": torch.ones(300, 300, dtype=dtype)}
    weights["bad"][150, 150] = value
    assert nonfinite_names(weights) == ["bad"]


def test_large_sums_and_values_that_are_not_floats_are_finite():
    assert not nonfinite_names(
        {
            "large": torch.full((10,), 3e38),
            "half": torch.full((1000,), 6e4, dtype=torch.float16),
            "integers": torch.ones(3, dtype=torch.int64),
            "meta": torch.empty(3, device="meta"),
        }
    )


@pytest.mark.parametrize("content", ["{}", "[]", "<html>", '{"weight_map": []}'])
def test_what_is_not_an_index_is_named(tmp_path, content):
    (tmp_path / "x.index.json").write_text(content)
    with pytest.raises(ValueError, match=r"x\.index\.json "):
        read_index(tmp_path / "x.index.json")


class Harmful:
    ran = False

    def __reduce__(self) -> tuple[object, ...]:
        return exec, ("import tests.storage.test_weights as t; t.Harmful.ran = True",)


@pytest.mark.parametrize(
    "save", [torch.save, lambda value, path: path.write_bytes(pickle.dumps(value, protocol=2))]
)
def test_pickle_that_wants_to_run_code_is_refused_with_the_reason(tmp_path, save):
    save({"a.weight": Harmful()}, tmp_path / "x.bin")
    with pytest.raises(ValueError, match=r"x\.bin is a pickle that wants more.*not opened.*exec"):
        read_weights(tmp_path / "x.bin")
    assert not Harmful.ran


def test_a_file_without_tensors_says_so(tmp_path):
    torch.save({"epoch": 3}, tmp_path / "x.bin")
    with pytest.raises(ValueError, match=r"x\.bin holds no tensors"):
        read_weights(tmp_path / "x.bin")


# ---- the strict check ----


@pytest.fixture
def module() -> nn.Module:
    return nn.ModuleDict({"a": nn.Linear(3, 2)})


def test_tensors_are_assigned_not_copied(module):
    state = {"a.weight": torch.ones(2, 3), "a.bias": torch.zeros(2)}
    assign_weights(module, state, where="x.bin")
    assert module["a"].weight.data_ptr() == state["a.weight"].data_ptr()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"a.bias": None}, "missing keys: a.bias"),
        ({"c": torch.ones(1)}, "unexpected keys: c"),
        ({"a.bias": torch.ones(9)}, r"mismatched keys: a\.bias: \(9,\) instead of \(2,\)"),
    ],
)
def test_every_tensor_has_its_place_and_every_place_its_tensor(module, change, message):
    state = {"a.weight": torch.ones(2, 3), "a.bias": torch.zeros(2)} | change
    state = {key: value for key, value in state.items() if value is not None}
    with pytest.raises(ValueError, match=rf"weights of x\.bin do not fit.* {message}"):
        assign_weights(module, state, where="x.bin")


def test_five_names_of_each_kind_are_listed_and_the_rest_counted():
    with pytest.raises(ValueError, match=r"missing keys: a, b, c, d, e and 2 more\. *$"):
        require_fit("x", missing=list("gfedcba"))
    require_fit("x")


def test_what_transformers_only_logs_is_an_error():
    info = {"missing_keys": {"m"}, "unexpected_keys": set(), "mismatched_keys": set()}
    with pytest.raises(ValueError, match="missing keys: m"):
        require_loaded("x", info)
    with pytest.raises(ValueError, match="errors: broken"):
        require_loaded("x", {"error_msgs": ["broken"]})


def test_what_is_not_finite_is_refused_with_what_may_be_wrong():
    require_finite("the tower", torch.ones(3))
    for value in (float("nan"), float("inf")):
        with pytest.raises(ValueError, match=r"the tower gives NaN or infinity: .*torch\.float16"):
            require_finite("the tower", torch.tensor([1.0, value], dtype=torch.float16))
