import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from moellava.model.builder_enhanced import (
    load_pretrained_model,
)
from moellava.testing import TINYLLAMA
from tests.model.prompts import chat_inputs

RELOAD = """
import json, sys, torch
from moellava.testing import blocked_network
with blocked_network():
    from moellava import load_pretrained_model
    loaded = load_pretrained_model(sys.argv[1])
    inputs = torch.load(sys.argv[2], weights_only=True)
    with torch.no_grad():
        logits = loaded.model(**inputs).logits
    new = loaded.model.generate(**inputs, max_new_tokens=8, max_length=None, do_sample=False)
    torch.save(logits, sys.argv[3])
    print(json.dumps(loaded.tokenizer.batch_decode(new)))
"""


def test_a_saved_and_moved_model_reloads_in_a_new_process_bit_for_bit(loaded, images, tmp_path):
    inputs = dict(chat_inputs(loaded, images, ["What is this?", "Is this a CT image?", "Why?"]))
    with torch.no_grad():
        logits = loaded.model(**inputs).logits
    text = loaded.tokenizer.batch_decode(
        loaded.model.generate(**inputs, max_new_tokens=8, max_length=None, do_sample=False)
    )
    loaded.model.save_pretrained(tmp_path / "first", max_shard_size="5MB")
    loaded.processor.save_pretrained(tmp_path / "first")
    (tmp_path / "first").rename(tmp_path / "saved")
    torch.save(inputs, tmp_path / "inputs.pt")

    empty_cache = {"HF_HUB_CACHE": str(tmp_path / "no-cache"), "HF_HUB_OFFLINE": "1"}
    script = [
        sys.executable,
        "-c",
        RELOAD,
        tmp_path / "saved",
        tmp_path / "inputs.pt",
        tmp_path / "logits.pt",
    ]
    import os

    output = subprocess.run(
        script, check=True, capture_output=True, text=True, env=os.environ | empty_cache
    ).stdout
    reloaded = torch.load(tmp_path / "logits.pt")
    torch.testing.assert_close(reloaded, logits, rtol=1e-6, atol=1e-6)
    assert json.loads(output) == text
    saved_config = (tmp_path / "saved" / "config.json").read_text()
    assert str(tmp_path.parent) not in saved_config
    assert "moellava-hub-" not in saved_config, (
        "an absolute path of this machine is in the checkpoint"
    )


def test_the_auto_classes_open_a_saved_model(loaded, tmp_path, images):
    from transformers import AutoModelForImageTextToText, AutoProcessor

    loaded.model.save_pretrained(tmp_path)
    loaded.processor.save_pretrained(tmp_path)
    model, processor = (
        AutoModelForImageTextToText.from_pretrained(tmp_path),
        AutoProcessor.from_pretrained(tmp_path),
    )
    assert type(processor) is type(loaded.processor)
    pixels = processor.image_processor(images, return_tensors="pt")["pixel_values"]
    assert torch.equal(pixels, loaded.image_processor(images, return_tensors="pt")["pixel_values"])
    state = loaded.model.state_dict()
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())


def test_a_saved_model_opens_by_its_hub_id_and_revision(loaded, tmp_path, no_network):
    commit, repo = "f" * 40, tmp_path / "models--me--chest-xray"
    loaded.model.save_pretrained(repo / "snapshots" / commit)
    loaded.processor.save_pretrained(repo / "snapshots" / commit)
    hub = {"cache_dir": tmp_path, "local_files_only": True}
    again = load_pretrained_model("me/chest-xray", revision=commit, **hub)
    assert torch.equal(again.model.lm_head.weight, loaded.model.lm_head.weight)
    for options in ({"revision": "e" * 40}, {}):  # there is no "main" in this cache
        with pytest.raises(OSError, match="me/chest-xray"):
            load_pretrained_model("me/chest-xray", **options, **hub)


def test_device_map_opens_a_saved_model(loaded, tmp_path):
    loaded.model.save_pretrained(tmp_path)
    loaded.processor.save_pretrained(tmp_path)
    spread = load_pretrained_model(tmp_path, device_map={"": "cpu"})
    assert all(
        torch.equal(a, b)
        for a, b in zip(spread.model.parameters(), loaded.model.parameters(), strict=True)
    )


class TestBadInput:
    def test_a_language_model_alone_is_no_saved_model(self, hub_cache):
        with pytest.raises(ValueError, match=r"'llama' checkpoint.*'mm_vision_tower'"):
            load_pretrained_model(TINYLLAMA)

    def test_parts_of_a_saved_model_are_fixed(self, tmp_path):
        with pytest.raises(ValueError, match="parts are fixed"):
            load_pretrained_model(tmp_path, encoder_type="biomedclip")


class TestWholeCheckpoints:
    @pytest.fixture(scope="class")
    def sharded(self, loaded, tmp_path_factory) -> Path:
        folder = tmp_path_factory.mktemp("sharded")
        loaded.model.save_pretrained(folder, max_shard_size="5MB")
        loaded.processor.save_pretrained(folder)
        return folder

    def test_shards_are_safetensors_and_reload_bit_for_bit_without_a_hub(
        self, loaded, sharded, no_network
    ):
        assert len(list(sharded.glob("model-*.safetensors"))) > 2
        assert not list(sharded.glob("*.bin"))
        assert_same_weights(
            load_pretrained_model(sharded, dtype="float32").model, state_of(loaded.model)
        )

    def test_no_file_holds_a_path_of_this_machine(self, sharded):
        for path in sharded.iterdir():
            if path.suffix != ".safetensors":
                text = path.read_text()
                assert "moellava-hub-" not in text, path.name
                assert str(sharded.parent) not in text, path.name

    def test_a_missing_shard_is_named(self, sharded, tmp_path):
        folder = shutil.copytree(sharded, tmp_path / "copy")
        shard = sorted(folder.glob("model-00002-of-*.safetensors"))[0]
        shard.unlink()
        with pytest.raises(OSError, match=shard.name):
            load_pretrained_model(folder)

    def test_the_config_says_where_language_model_and_tower_came_from(self, sharded):
        config = json.loads((sharded / "config.json").read_text())
        assert (config["language_model"], len(config["language_model_revision"])) == (TINYLLAMA, 40)
        assert config["vision_config"]["tower"] == "biomedclip_small"


def state_of(model):
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def assert_same_weights(model, state):
    found = model.state_dict()
    assert found.keys() == state.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in state.items())
