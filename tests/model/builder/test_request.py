import json
from dataclasses import dataclass
from types import SimpleNamespace

import pytest

from moellava.encoders import encoder_options
from moellava.model.builder.request import known_keys, read_build_request
from moellava.model.builder_enhanced import (
    CustomVisionConfig,
    load_pretrained_model,
)
from moellava.testing import TINYLLAMA


def test_an_object_or_dataclass_describes_a_model_as_a_mapping_does(parts):
    @dataclass
    class Description:
        model_name_or_path: str = parts["model_name_or_path"]
        mm_vision_tower: str = parts["mm_vision_tower"]

    for description in (Description(), SimpleNamespace(**parts)):
        assert load_pretrained_model(description).model.config.num_image_tokens == 196


@pytest.mark.parametrize("suffix", ["yaml", "json"])
def test_a_file_describes_a_model_as_a_mapping_does(parts, suffix, tmp_path):
    path = tmp_path / f"model.{suffix}"
    path.write_text(json.dumps(parts | {"projector_type": "linear"}))
    assert load_pretrained_model(path).model.config.projector_type == "linear"


class TestBadInput:
    def test_an_unknown_key_suggests_the_nearest(self, parts):
        with pytest.raises(
            ValueError, match=r"'mm_vision_towr'\. Did you mean 'mm_vision_tower'\?"
        ):
            load_pretrained_model({"mm_vision_towr": "x", "model_name_or_path": TINYLLAMA})

    def test_a_missing_key_is_named(self, parts):
        with pytest.raises(ValueError, match=r"no 'mm_vision_tower'.*Found: model_name_or_path"):
            load_pretrained_model({"model_name_or_path": TINYLLAMA})

    def test_a_contradiction_names_both_values(self, parts):
        with pytest.raises(
            ValueError, match=r"'clip' in the model description and 'biomedclip' in the argument"
        ):
            load_pretrained_model(parts | {"encoder_type": "clip"}, encoder_type="biomedclip")
        with pytest.raises(
            ValueError, match=r"select_layer is -3 .* and -2 in custom_vision_config \(as 'vision_f"
        ):
            load_pretrained_model(
                parts | {"mm_vision_select_layer": -3}, custom_vision_config=CustomVisionConfig()
            )

    def test_a_wrong_description_type_says_what_is_expected(self):
        with pytest.raises(TypeError, match="is a int; give a mapping"):
            load_pretrained_model(3)

    def test_a_description_file_that_is_none_is_refused(self, tmp_path):
        (tmp_path / "a.yaml").write_text("{")
        with pytest.raises(ValueError, match=r"a\.yaml is not valid YAML"):
            load_pretrained_model(tmp_path / "a.yaml")
        (tmp_path / "b.json").write_text("[1]")
        with pytest.raises(ValueError, match=r"b\.json holds a list"):
            load_pretrained_model(tmp_path / "b.json")


class TestEncoderOptions:
    def test_they_come_from_the_encoders_configs(self, parts):
        asked = parts | {"patch_tokens": "real", "final_norm": True, "image_size": 112}
        vision = load_pretrained_model(asked).model.config.vision_config
        assert (vision.patch_tokens, vision.final_norm, vision.image_size) == ("real", True, 112)

    def test_every_option_of_every_family_is_a_key(self):
        assert set(encoder_options()) <= set(known_keys())

    def test_other_spellings_are_the_same_setting(self):
        for name in ("vision_feature_layer", "mm_vision_select_layer", "select_layer"):
            request = read_build_request({name: -3}, required=())
            assert request.encoder_options == {"select_layer": -3}

    def test_text_that_reads_as_a_number_is_one(self):
        request = read_build_request({"image_size": "336", "mm_hidden_size": "768"}, required=())
        assert request.encoder_options == {"image_size": 336}
        assert request.mm_hidden_size == 768

    @pytest.mark.parametrize("key", ["image_size", "mm_hidden_size", "vision_feature_layer"])
    def test_a_value_of_another_type_names_the_key(self, key):
        with pytest.raises(ValueError, match=f"{key} is 'x'"):
            read_build_request({key: "x"}, required=())

    def test_the_same_value_in_two_types_is_no_contradiction(self):
        custom = CustomVisionConfig(image_size=336)
        request = read_build_request(
            {"image_size": "336"}, custom_vision_config=custom, required=()
        )
        assert request.encoder_options["image_size"] == 336


class TestProjectorConfig:
    def test_path_type_and_options_are_merged(self, tmp_path):
        request = read_build_request(
            {}, projector_config={"type": "pixel_shuffle", "factor": 2}, required=()
        )
        assert (request.projector_type, request.projector_options) == (
            "pixel_shuffle",
            {"factor": 2},
        )
        request = read_build_request({}, projector_config={"path": tmp_path}, required=())
        assert request.projector_path == str(tmp_path)

    def test_options_without_a_type_say_what_is_missing(self):
        with pytest.raises(
            ValueError, match=r"'factor'\. Known: path, type\. Options .* need its 'type'"
        ):
            read_build_request({}, projector_config={"factor": 2}, required=())
