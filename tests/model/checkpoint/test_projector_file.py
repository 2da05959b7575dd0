import json
import logging
from itertools import pairwise
from types import SimpleNamespace

import pytest
import torch

from moellava.model.builder_enhanced import load_pretrained_model
from moellava.model.checkpoint.difference import save_trainable
from moellava.model.checkpoint.projector_file import read_projector, save_projector
from moellava.testing import write_biomedclip

PREFIX = "model.mm_projector."


def projector_of(loaded):
    return loaded.model.model.multi_modal_projector.state_dict()


def assert_same(first, second):
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.fixture(scope="module")
def trained(parts):
    """A model whose projector is not the one that a seed gives."""
    loaded = load_pretrained_model(parts, dtype="float32")
    with torch.no_grad():
        for weight in loaded.model.model.multi_modal_projector.parameters():
            weight.normal_(std=0.2)
    return loaded


@pytest.fixture(scope="module")
def saved(trained, tmp_path_factory):
    folder = tmp_path_factory.mktemp("projector")
    save_projector(trained.model, folder)
    return folder


@pytest.fixture(scope="module")
def other_tower(tmp_path_factory):
    """The same shapes, other weights."""
    return write_biomedclip(
        tmp_path_factory.mktemp("towers") / "medclip_b", vision="vit_tiny_patch16_224", seed=1
    )


def write_llava_projector(folder, widths, *, linear=False):
    weights = {}
    for index, (width_in, width_out) in enumerate(pairwise(widths)):
        name = PREFIX + ("" if linear else f"{2 * index}.")
        weights |= {
            f"{name}weight": torch.randn(width_out, width_in),
            f"{name}bias": torch.randn(width_out),
        }
    torch.save(weights, folder / "mm_projector.bin")
    return weights


class TestOurOwnFile:
    @pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
    def test_a_trained_projector_comes_back(self, parts, trained, saved, dtype, caplog):
        with caplog.at_level(logging.INFO, logger="moellava"):
            loaded = load_pretrained_model(parts, projector_config={"path": saved}, dtype=dtype)
        expected = {
            name: value.to(getattr(torch, dtype)) for name, value in projector_of(trained).items()
        }
        assert_same(projector_of(loaded), expected)
        assert f"loaded from {saved}, trained for biomedclip_small" in caplog.text

    def test_file_object_and_llavas_key_are_other_ways_to_say_it(self, parts, trained, saved):
        path = str(saved / "projector.safetensors")
        for model in (
            load_pretrained_model(parts, projector_config=SimpleNamespace(path=path)),
            load_pretrained_model(parts | {"pretrain_mm_mlp_adapter": path}),
        ):
            assert (
                projector_of(model)["0.weight"].std() > 0.15
            )  # the trained one's, not a fresh one's

    def test_its_type_and_options_come_with_it(self, parts, tmp_path):
        loaded = load_pretrained_model(
            parts, projector_config={"type": "pixel_shuffle", "factor": 7}
        )
        save_projector(loaded.model, tmp_path)
        again = load_pretrained_model(parts, projector_config={"path": tmp_path}, seed=1)
        assert again.model.config.projector_options == {"factor": 7}
        assert again.processor.num_image_tokens == 4
        assert_same(projector_of(again), projector_of(loaded))
        with pytest.raises(
            ValueError,
            match=r"projector_type is 'linear', but the projector .* is a 'pixel_shuffle'",
        ):
            load_pretrained_model(
                parts | {"projector_type": "linear"}, projector_config={"path": tmp_path}
            )
        with pytest.raises(ValueError, match=r"\{'factor': 2\}, but .* has \{'factor': 7\}"):
            load_pretrained_model(
                parts | {"projector_options": {"factor": 2}}, projector_config={"path": tmp_path}
            )

    def test_another_tower_is_refused_and_both_are_named(self, parts, saved, other_tower):
        with pytest.raises(
            ValueError,
            match=r"trained for the tower biomedclip_small .*this model has medclip_b .*weights",
        ):
            load_pretrained_model(
                parts | {"mm_vision_tower": str(other_tower)}, projector_config={"path": saved}
            )

    @pytest.mark.parametrize(
        ("setting", "differing"),
        [
            ({"vision_feature_layer": -3}, "differ in select_layer"),
            ({"image_size": 112}, "differ in num_patches"),
        ],
    )
    def test_another_use_of_the_tower_is_refused(self, parts, saved, setting, differing):
        with pytest.raises(ValueError, match=differing):
            load_pretrained_model(parts | setting, projector_config={"path": saved})


class TestOutOfASavedModel:
    def test_a_whole_model_gives_its_projector(self, parts, trained, other_tower, tmp_path):
        trained.model.save_pretrained(tmp_path)
        loaded = load_pretrained_model(parts, projector_config={"path": tmp_path}, dtype="float32")
        assert_same(projector_of(loaded), projector_of(trained))
        with pytest.raises(ValueError, match="differ in weights"):
            load_pretrained_model(
                parts | {"mm_vision_tower": str(other_tower)}, projector_config={"path": tmp_path}
            )

    def test_a_difference_from_the_base_gives_its_projector(
        self, parts, trained, other_tower, tmp_path
    ):
        save_trainable(trained, tmp_path)
        loaded = load_pretrained_model(parts, projector_config={"path": tmp_path}, dtype="float32")
        assert_same(projector_of(loaded), projector_of(trained))
        with pytest.raises(ValueError, match="differ in weights"):
            load_pretrained_model(
                parts | {"mm_vision_tower": str(other_tower)}, projector_config={"path": tmp_path}
            )

    def test_a_projector_trained_with_its_tower_needs_that_tower(self, parts, tmp_path):
        loaded = load_pretrained_model(parts)
        with torch.no_grad():
            loaded.model.model.vision_tower.visual.trunk.blocks[0].attn.qkv.weight.add_(1)
        save_trainable(loaded, tmp_path)
        with pytest.raises(ValueError, match="trained together with its tower"):
            read_projector(tmp_path)


class TestLlavas:
    @pytest.mark.parametrize(
        ("widths", "linear", "projector_type"),
        [
            ((192, 64, 64), False, "mlp2x_gelu"),
            ((192, 64), True, "linear"),
            ((192, 64, 64, 64), False, "mlp3x_gelu"),
        ],
    )
    def test_a_pickle_is_read_its_type_found_and_its_silence_reported(
        self, parts, tmp_path, widths, linear, projector_type, caplog
    ):
        weights = write_llava_projector(tmp_path, widths, linear=linear)
        loaded = load_pretrained_model(parts, projector_config={"path": tmp_path}, dtype="float32")
        assert loaded.model.config.projector_type == projector_type
        assert_same(
            projector_of(loaded),
            {name.removeprefix(PREFIX): value for name, value in weights.items()},
        )
        assert "names no tower" in caplog.text

    def test_wrong_widths_name_both_sides(self, parts, tmp_path):
        write_llava_projector(tmp_path, (1024, 4096, 4096))
        message = (
            r"from width 1024 to 4096, but the tower .* width 192 and the language model takes 64"
        )
        with pytest.raises(ValueError, match=message):
            load_pretrained_model(parts, projector_config={"path": tmp_path})

    def test_a_hidden_width_that_does_not_fit_names_the_layer(self, parts, tmp_path):
        write_llava_projector(tmp_path, (192, 50, 64))
        with pytest.raises(
            ValueError, match=r"a mlp2x_gelu .*do not fit.*0\.bias: \(50,\) instead of \(64,\)"
        ):
            load_pretrained_model(parts, projector_config={"path": tmp_path})

    @pytest.mark.parametrize("key", ["mm_vision_tower", "mm_image_tower"])
    def test_the_tower_in_the_config_beside_it_counts(self, parts, tmp_path, key):
        write_llava_projector(tmp_path, (192, 64, 64))
        config = {
            "model_type": "llava_llama",
            key: "openai/clip-vit-large-patch14-336",
            "mm_vision_select_layer": -2,
        }
        (tmp_path / "config.json").write_text(json.dumps(config))
        with pytest.raises(
            ValueError, match=r"tower openai/clip-vit-large.*this model has biomedclip_small.*tower"
        ):
            load_pretrained_model(parts, projector_config={"path": tmp_path})
        (tmp_path / "config.json").write_text(
            json.dumps(config | {key: "someone/BiomedCLIP_small"})
        )
        load_pretrained_model(parts, projector_config={"path": tmp_path})
        (tmp_path / "config.json").write_text(
            json.dumps({key: parts["mm_vision_tower"], "mm_vision_select_layer": -1})
        )
        with pytest.raises(ValueError, match="differ in select_layer"):
            load_pretrained_model(parts, projector_config={"path": tmp_path})

    def test_other_layers_are_no_projector(self, tmp_path):
        torch.save({PREFIX + "1.weight": torch.ones(2, 2)}, tmp_path / "mm_projector.bin")
        with pytest.raises(ValueError, match="holds layers 1, which are not a projector"):
            read_projector(tmp_path)


class TestBadInput:
    def test_an_unknown_key_of_projector_config_lists_the_known(self, parts):
        with pytest.raises(ValueError, match=r"Unknown key in projector_config: 'pth'.*path"):
            load_pretrained_model(parts, projector_config={"pth": "x"})
        with pytest.raises(
            ValueError, match=r"option of projector 'qformer': 'num_hidden_layers'.*num_layers"
        ):
            load_pretrained_model(
                parts, projector_config={"type": "qformer", "num_hidden_layers": 2}
            )

    def test_a_missing_file_is_named(self, parts, tmp_path):
        with pytest.raises(FileNotFoundError, match=rf"No projector at {tmp_path}"):
            load_pretrained_model(parts, projector_config={"path": tmp_path})

    def test_the_projector_of_a_saved_model_is_fixed(self, tmp_path):
        with pytest.raises(ValueError, match="leave out projector_config"):
            load_pretrained_model(tmp_path, projector_config={"path": "x"})
