import json

import pytest

from moellava.model.builder_enhanced import load_pretrained_model
from moellava.model.checkpoint import strict


class TestBadInput:
    def test_a_checkpoint_without_one_tensor_is_refused(self, loaded, tmp_path):
        from safetensors.torch import load_file, save_file

        loaded.model.save_pretrained(tmp_path)
        loaded.processor.save_pretrained(tmp_path)
        state = load_file(tmp_path / "model.safetensors")
        del state["model.vision_tower.visual.trunk.cls_token"]
        save_file(state, tmp_path / "model.safetensors", metadata={"format": "pt"})
        with pytest.raises(
            ValueError, match=r"missing keys: model\.vision_tower\.visual\.trunk\.cls_token"
        ):
            load_pretrained_model(tmp_path)

    @pytest.fixture
    def sharded(self, loaded, tmp_path):
        loaded.model.save_pretrained(tmp_path, max_shard_size="10MB")
        loaded.processor.save_pretrained(tmp_path)
        return tmp_path

    def test_a_missing_shard_is_named(self, sharded):
        shard = sorted(sharded.glob("model-*.safetensors"))[1]
        shard.unlink()
        with pytest.raises(OSError, match=shard.name):
            load_pretrained_model(sharded)

    def test_a_half_written_shard_is_named(self, sharded):
        shard = sorted(sharded.glob("model-*.safetensors"))[1]
        shard.write_bytes(shard.read_bytes()[:-1000])
        with pytest.raises((OSError, ValueError), match=shard.name):
            load_pretrained_model(sharded)

    def test_a_config_that_asks_for_more_than_the_files_hold_allocates_nothing(
        self, sharded, monkeypatch
    ):
        path = sharded / "config.json"
        config = json.loads(path.read_text())
        config["text_config"]["vocab_size"] = 10_000_000
        path.write_text(json.dumps(config))
        monkeypatch.setattr(strict, "_from_pretrained", None)
        with pytest.raises(ValueError, match=r"asks for [\d,]+ values, but its files .* bytes"):
            load_pretrained_model(sharded)

    def test_an_index_that_leaves_the_folder_is_refused(self, sharded):
        index = sharded / "model.safetensors.index.json"
        content = json.loads(index.read_text())
        content["weight_map"]["lm_head.weight"] = "../outside.safetensors"
        index.write_text(json.dumps(content))
        with pytest.raises(ValueError, match=r"names the file '\.\./outside\.safetensors'"):
            load_pretrained_model(sharded)

    def test_a_folder_without_weights_is_refused(self, loaded, tmp_path):
        loaded.model.config.save_pretrained(tmp_path)
        loaded.processor.save_pretrained(tmp_path)
        with pytest.raises(OSError, match=r"model\.safetensors"):
            load_pretrained_model(tmp_path)

    @pytest.mark.parametrize("value", [float("nan"), float("inf")])
    @pytest.mark.parametrize("part", ["multi_modal_projector.0.weight", "layers.1.input_layernorm"])
    def test_weights_of_a_diverged_training_are_refused(self, loaded, tmp_path, value, part):
        from safetensors.torch import load_file, save_file

        loaded.model.save_pretrained(tmp_path)
        loaded.processor.save_pretrained(tmp_path)
        state = load_file(tmp_path / "model.safetensors")
        name = next(name for name in state if part in name)
        state[name] = state[name].clone()
        state[name].view(-1)[state[name].numel() // 2] = value  # one, in the middle
        save_file(state, tmp_path / "model.safetensors", metadata={"format": "pt"})
        with pytest.raises(ValueError, match=f"NaN or infinite values: {name}"):
            load_pretrained_model(tmp_path)
