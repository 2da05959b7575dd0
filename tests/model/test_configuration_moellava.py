"""The configuration of the joined model, and that no file of a saved one names a place."""

import json
import shutil

import pytest

from moellava.model.builder_enhanced import load_pretrained_model
from moellava.model.checkpoint.difference import load_trainable, save_trainable
from moellava.model.configuration_moellava import MoeLlavaConfig
from moellava.model.publish.remote_code import write_remote_code
from moellava.testing import TINYLLAMA


@pytest.fixture(scope="module")
def local(parts, hub_cache, tmp_path_factory):
    """A model whose parts are folders of this machine."""
    folder = tmp_path_factory.mktemp("secret-place") / "own-llama"
    shutil.copytree(hub_cache[TINYLLAMA], folder)
    return load_pretrained_model(parts | {"model_name_or_path": str(folder)})


def assert_no_place(folder):
    for path in folder.rglob("*"):
        if path.is_file() and path.suffix != ".safetensors":
            text = path.read_text()
            assert "secret-place" not in text, path
            assert "moellava-hub-" not in text, path


def test_the_folders_of_the_parts_are_in_no_saved_file(local, parts, tmp_path):
    whole = tmp_path / "secret-place-whole"
    local.model.save_pretrained(whole)
    local.processor.save_pretrained(whole)
    write_remote_code(whole)
    assert_no_place(whole)
    again = load_pretrained_model(whole)
    again.model.save_pretrained(tmp_path / "again")
    again.processor.save_pretrained(tmp_path / "again")
    assert_no_place(tmp_path / "again")


def test_a_difference_and_its_adapter_name_no_place(local, parts, tmp_path):
    peft = pytest.importorskip("peft")
    save_trainable(local, tmp_path / "secret-place" / "delta")
    assert_no_place(tmp_path / "secret-place" / "delta")
    base = dict(local.model.built_from)
    opened = load_trainable(tmp_path / "secret-place" / "delta", base=base)
    config = peft.LoraConfig(target_modules=["q_proj"])
    adapted = peft.get_peft_model(opened.model, config)
    adapted.model.name_or_path = str(tmp_path / "secret-place")
    save_trainable(adapted, tmp_path / "adapted", processor=opened.processor, base=base)
    assert_no_place(tmp_path / "adapted")
    saved = json.loads((tmp_path / "adapted" / "adapter" / "adapter_config.json").read_text())
    assert saved["base_model_name_or_path"] == "own-llama"
    assert load_trainable(tmp_path / "adapted", base=base).model.peft_config


def test_a_config_survives_a_file(loaded, tmp_path):
    loaded.model.config.save_pretrained(tmp_path)
    again = MoeLlavaConfig.from_pretrained(tmp_path)
    assert again.num_image_tokens == 196
    assert again.to_dict() == loaded.model.config.to_dict()
