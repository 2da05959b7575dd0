import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from moellava.model.builder_enhanced import load_pretrained_model
from moellava.model.checkpoint import difference
from moellava.model.checkpoint.difference import load_trainable, save_trainable
from moellava.testing import (
    BIOMEDCLIP,
    TINYLLAMA,
    in_fresh_memory,
    write_biomedclip,
    write_tinyllama,
)

PROJECTOR_AND_MIXTURES = ("multi_modal_projector.", ".mlp.experts.", ".mlp.gate.", ".added_rows")


def state_of(model):
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def assert_same_weights(model, state):
    found = model.state_dict()
    assert found.keys() == state.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in state.items())


@pytest.fixture
def small(parts):
    """A model of its own, in its language model's dtype, with the parts' folders as base."""
    return load_pretrained_model(parts)


class TestTrainable:
    def test_an_untrained_model_saves_projector_mixtures_and_added_rows_alone(
        self, small, tmp_path
    ):
        names = save_trainable(small, tmp_path)
        assert names
        assert all(any(part in name for part in PROJECTOR_AND_MIXTURES) for name in names), names
        saved = load_file(tmp_path / "trainable.safetensors")
        assert saved["lm_head.weight.added_rows"].shape == (1, 64)

    @pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
    def test_what_was_trained_comes_back_bit_for_bit(self, parts, tmp_path, images, dtype):
        loaded = load_pretrained_model(parts, dtype=dtype)
        with torch.no_grad():
            for name, weight in loaded.model.named_parameters():
                if any(
                    part in name
                    for part in ("projector", "experts", "gate.weight", "layers.1.self_attn.q_proj")
                ):
                    weight.add_(torch.randn_like(weight) * 0.05)
            loaded.model.get_input_embeddings().weight[32000] += 1  # the row of <image>
        names = save_trainable(loaded, tmp_path)
        assert "model.language_model.layers.1.self_attn.q_proj.weight" in names
        assert "model.language_model.embed_tokens.weight" not in names
        answer = loaded.answer(images[0], "What is this?", max_new_tokens=8)
        again = load_trainable(tmp_path, base={"mm_vision_tower": parts["mm_vision_tower"]})
        assert_same_weights(again.model, state_of(loaded.model))
        assert again.answer(images[0], "What is this?", max_new_tokens=8) == answer
        assert not again.model.training

    def test_parts_under_their_hub_ids_need_nothing_but_the_folder(
        self, hub_cache, tmp_path, no_network
    ):
        loaded = load_pretrained_model(
            {"model_name_or_path": TINYLLAMA, "mm_vision_tower": BIOMEDCLIP}
        )
        save_trainable(loaded, tmp_path)
        description = json.loads((tmp_path / "base.json").read_text())
        assert description["language model"]["name"] == TINYLLAMA
        assert description["vision tower"]["name"] == BIOMEDCLIP
        assert len(description["vision tower"]["revision"]) == 40
        assert_same_weights(load_pretrained_model(tmp_path).model, state_of(loaded.model))
        assert (
            tmp_path / "trainable.safetensors"
        ).stat().st_size < loaded.model.get_memory_footprint() / 20

    def test_a_second_save_into_the_same_folder_is_right(self, small, parts, tmp_path):
        save_trainable(small, tmp_path)
        base = {"mm_vision_tower": parts["mm_vision_tower"]}
        again = load_trainable(tmp_path, base=base)  # mapped to the file that is written next
        with torch.no_grad():
            again.model.lm_head.weight[5] += 1
        assert "lm_head.weight" in save_trainable(again, tmp_path)
        assert_same_weights(load_trainable(tmp_path, base=base).model, state_of(again.model))

    def test_a_dense_model_with_tied_embeddings_and_another_image_size(
        self, tmp_path, parts, hub_cache
    ):
        from transformers import LlamaForCausalLM

        folder = tmp_path / "tied"
        shutil.copytree(hub_cache[TINYLLAMA], folder)
        model = LlamaForCausalLM.from_pretrained(folder, tie_word_embeddings=True)
        model.save_pretrained(folder)
        request = parts | {"model_name_or_path": str(folder), "image_size": 112}
        loaded = load_pretrained_model(request, moe_config=False, dtype="float32")
        names = save_trainable(loaded, tmp_path / "saved")
        assert {name.split(".")[1] for name in names} == {"multi_modal_projector", "language_model"}
        assert sum("language_model" in name for name in names) == 1  # the row of <image>
        base = {key: request[key] for key in ("model_name_or_path", "mm_vision_tower")}
        assert_same_weights(
            load_trainable(tmp_path / "saved", base=base).model, state_of(loaded.model)
        )

    @pytest.mark.parametrize("moment", range(1, 6))
    def test_a_save_that_ends_while_files_are_replaced_is_not_opened(
        self, small, parts, tmp_path, monkeypatch, moment
    ):
        save_trainable(small, tmp_path)
        before = state_of(small.model)
        with torch.no_grad():
            small.model.lm_head.weight[5] += 1
        replaced = []

        def killed(source, target):
            if len(replaced) == moment:
                raise KeyboardInterrupt
            replaced.append(target)
            shutil.move(source, target)

        monkeypatch.setattr(difference.os, "replace", killed)
        with pytest.raises(KeyboardInterrupt):
            save_trainable(small, tmp_path)
        monkeypatch.undo()
        assert replaced
        with pytest.raises(OSError, match=r"not complete: save_trainable was stopped.*Save the"):
            load_pretrained_model(tmp_path)
        save_trainable(small, tmp_path)
        again = load_pretrained_model_with(tmp_path, parts)
        assert not torch.equal(again.model.lm_head.weight, before["lm_head.weight"])
        assert_same_weights(again.model, state_of(small.model))

    def test_a_save_that_fails_before_leaves_the_old_one(self, small, parts, tmp_path, monkeypatch):
        save_trainable(small, tmp_path)
        before = state_of(small.model)
        with torch.no_grad():
            small.model.lm_head.weight[5] += 1
        monkeypatch.setattr(
            difference, "write_json", lambda *_: (_ for _ in ()).throw(OSError("full"))
        )
        with pytest.raises(OSError, match="full"):
            save_trainable(small, tmp_path)
        assert not (tmp_path / ".saving").exists()
        assert_same_weights(load_pretrained_model_with(tmp_path, parts).model, before)

    def test_an_adapter_of_an_earlier_save_is_gone(self, small, parts, tmp_path):
        peft = pytest.importorskip("peft")
        config = peft.LoraConfig(target_modules=["q_proj"], init_lora_weights=False)
        adapted = peft.get_peft_model(small.model, config)
        save_trainable(adapted, tmp_path, processor=small.processor)
        assert (tmp_path / "adapter").is_dir()
        save_trainable(adapted.merge_and_unload(), tmp_path, processor=small.processor)
        again = load_pretrained_model_with(tmp_path, parts)
        assert not hasattr(again.model, "peft_config")

    def test_an_adapter_comes_back_with_the_model(self, small, parts, tmp_path, images):
        peft = pytest.importorskip("peft")
        config = peft.LoraConfig(
            target_modules=r".*language_model.*(q_proj|v_proj)",
            target_parameters=["mlp.experts.down_proj"],
            modules_to_save=["multi_modal_projector"],
            init_lora_weights=False,
        )
        adapted = peft.get_peft_model(small.model, config).eval()
        names = save_trainable(adapted, tmp_path, processor=small.processor)
        assert not any("lora" in name or "q_proj" in name for name in names)
        again = load_pretrained_model_with(tmp_path, parts)
        batch = small.processor(text=["<image> What?"], images=images[:1], return_tensors="pt")
        with torch.no_grad():
            expected = in_fresh_memory(adapted)(**batch).logits
            assert torch.equal(in_fresh_memory(again.model)(**batch).logits, expected)


def load_pretrained_model_with(folder, parts):
    return load_trainable(folder, base={"mm_vision_tower": parts["mm_vision_tower"]})


class TestBadInput:
    @pytest.fixture(scope="class")
    def saved(self, loaded, tmp_path_factory):
        folder = tmp_path_factory.mktemp("saved") / "delta"
        save_trainable(loaded, folder)
        return folder

    def test_another_language_model_is_refused_and_both_are_named(self, saved, parts, tmp_path):
        other = write_tinyllama(tmp_path / "other-llama", seed=1)
        base = {"model_name_or_path": other, "mm_vision_tower": parts["mm_vision_tower"]}
        with pytest.raises(
            ValueError,
            match=rf"language model {TINYLLAMA}@\w{{7}} \(sha256 .*other-llama' holds other",
        ):
            load_trainable(saved, base=base)

    def test_another_tower_is_refused_and_both_are_named(self, saved, tmp_path):
        other = write_biomedclip(
            tmp_path / "other-biomedclip", vision="vit_tiny_patch16_224", seed=1
        )
        with pytest.raises(
            ValueError,
            match=r"vision tower biomedclip_small \(sha256 .*other-biomedclip' holds other",
        ):
            load_trainable(saved, base={"mm_vision_tower": other})

    def test_a_language_model_of_another_depth_is_refused(self, saved, parts, tmp_path):
        other = write_tinyllama(tmp_path / "deep-llama", num_hidden_layers=5)
        base = {"model_name_or_path": other, "mm_vision_tower": parts["mm_vision_tower"]}
        with pytest.raises(ValueError, match=r"do not fit|holds other weights"):
            load_trainable(saved, base=base)

    def test_a_base_that_cannot_be_found_says_how_to_name_it(self, saved):
        with pytest.raises(
            OSError, match=r"(?s)vision tower biomedclip_small.*base=\{'model_name_or_path'"
        ):
            load_pretrained_model(saved)

    def test_an_unknown_part_suggests_the_nearest(self, saved):
        with pytest.raises(ValueError, match="Did you mean 'mm_vision_tower'"):
            load_trainable(saved, base={"vision_tower": "x"})

    def test_a_missing_saved_tensor_is_named(self, saved, parts, tmp_path):
        folder = shutil.copytree(saved, tmp_path / "copy")
        state = load_file(folder / "trainable.safetensors")
        del state["model.multi_modal_projector.0.bias"]
        save_file(state, folder / "trainable.safetensors")
        with pytest.raises(
            ValueError, match=r"missing keys: model\.multi_modal_projector\.0\.bias"
        ):
            load_pretrained_model_with(folder, parts)

    @pytest.mark.parametrize("checksum", [1.5, None, ["a"]])
    def test_a_checksum_that_is_not_text_is_named(self, saved, parts, tmp_path, checksum):
        folder = shutil.copytree(saved, tmp_path / "copy")
        description = json.loads((folder / "base.json").read_text())
        description["language model"]["sha256"] = checksum
        (folder / "base.json").write_text(json.dumps(description))
        with pytest.raises(ValueError, match=r"base\.json does not say which language model"):
            load_pretrained_model_with(folder, parts)

    def test_a_missing_weights_file_is_named(self, saved, parts, tmp_path):
        folder = shutil.copytree(saved, tmp_path / "copy")
        (folder / "trainable.safetensors").unlink()
        with pytest.raises(OSError, match=r"not complete: trainable\.safetensors is missing"):
            load_pretrained_model_with(folder, parts)

    def test_a_folder_of_another_kind_is_refused(self, hub_cache):
        with pytest.raises(OSError, match=r"has no base\.json"):
            load_trainable(hub_cache[TINYLLAMA])

    def test_an_adapter_put_in_by_transformers_is_refused(self, loaded, tmp_path, monkeypatch):
        monkeypatch.setattr(loaded.model, "peft_config", {}, raising=False)
        with pytest.raises(ValueError, match="from add_adapter"):
            save_trainable(loaded, tmp_path)

    def test_a_model_of_unknown_origin_is_refused(self, loaded, tmp_path, monkeypatch):
        monkeypatch.setattr(loaded.model.config, "language_model", None)
        with pytest.raises(ValueError, match="does not say which language model it was built from"):
            save_trainable(loaded, tmp_path)
